"""Passes recorded once and replayed, where starting a kernel takes longer than a small one runs.

A recording is a fixed sequence of kernels over fixed memory.  So a batch is padded to one of few shapes, its
buffer is filled and copied, and the replay does the rest.  A path (a guide's draft, its next word) is one
recording of several passes: each token goes from the statistics of one pass to the ids of the next on the
device, and the host waits once, at the end.

Nothing waits for a recording: a shape is run as it is when it first comes, and recorded when it comes again,
or before, while there is nothing else to do (`nudging.executor.warmup`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.executor.batch import BatchBuffer, BatchShape, shape_of
from nudging.kernels.lm_head import LINES, MAX, TOKEN, lm_head
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache

# Rows of one sequence up to which a pass is recorded: what a draft and its pass have, not what a prompt has.
MAX_ROWS = 16
# Sizes that a recording is made for: all that are asked for in between are padded.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256,
         320, 384, 512)  # fmt: skip
MAX_GAP = max(b - a for a, b in pairwise(SIZES))
WIDTHS = tuple(8 << n for n in range(10))
# Bytes of a GPU's memory that recordings made ahead leave to whoever else needs some.
LEFT_FREE = 1 << 30
# A process can capture one CUDA graph at a time: torch captures on a stream of the process and waits for the
# device first, which is an error while another capture is under way.
CAPTURING = threading.Lock()


class Recorder(Protocol):
    """How a device records."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run `run` and return what runs it again.

        `run` must allocate nothing that outlives it, never wait for the device, and find what it reads and
        writes at the same addresses every time.
        """

    def mark(self) -> Callable[[], None]:
        """What waits for all that was started so far, and for nothing that is started later."""

    def has_room(self) -> bool:
        """Whether recordings that nobody has asked for yet may take memory."""


class CudaRecorder:
    """CUDA graphs of one device that share one pool of memory: they never run at the same time.

    What a graph computes lies where another one computes, too, and is gone when that one is replayed, unless
    it is copied to memory that was there before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Graphs share memory where they were captured on one stream; made with the first of them.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            graph = self._capture(run)

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def has_room(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free >= LEFT_FREE

    def _capture(self, run: Callable[[], None]) -> Any:
        """What `run` launches, as a graph of the current device."""
        # Not the stream that torch would take: that one is of the device that was the first to record.
        stream = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Once as it is, on the stream that records: kernels are compiled and libraries set up.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another engine of this process may be at work on a thread of its own, or about to record.
        options = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
        with CAPTURING, torch.cuda.graph(graph, **options):
            run()
        self._pool = graph.pool()
        return graph


class Picks(NamedTuple):
    """How rows pick their tokens: temperature [rows] fp32, seed and output position [rows] int64."""

    temperature: Tensor
    seed: Tensor
    position: Tensor


class PickBuffer:
    """How the rows of a batch pick their tokens, on the host and on the device, one memory for every step."""

    def __init__(self, rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros((3, rows), dtype=torch.int64, pin_memory=pinned)
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        # The temperatures are fp32 in the first half of a row of int64.
        self.picks = Picks(self._device[0].view(torch.float32)[:rows], self._device[1], self._device[2])
        self._temperatures = self._host[0].view(torch.float32).numpy()
        self._keys = self._host[1:].numpy()

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Take over what the first rows want; those that pad the batch pick the likeliest token."""
        count = len(wanted)
        self._temperatures[:count] = [want.params.temperature for want in wanted]
        self._temperatures[count:] = 0
        self._keys[0, :count] = [(want.seed + 2**63) % 2**64 - 2**63 for want in wanted]
        self._keys[1, :count] = [want.position for want in wanted]
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


def is_picked_by_head(want: Wanted) -> bool:
    """Whether the row's token can be picked where its logits are computed, which then need not be written."""
    params = want.params
    unfiltered = params.top_k == 0 and params.top_p >= 1 and params.min_p == 0
    return not want.keep_logits and not params.changes_logits and (unfiltered or params.temperature == 0)


def answer(decoder: Decoder, cache: KVCache, batch: Batch, picks: Picks, vocab: int, out: Tensor) -> None:
    """One pass, its tokens picked among the first `vocab` by the head, which says into `out`, int32
    [LINES, rows], what rows are made of; logits need not be written.
    """
    x, norm = decoder.before_head(batch, cache)
    cap = decoder.config.final_soft_cap
    lm_head(x, decoder.weights.head, vocab, cap, *picks, batch.logit_rows, norm, out)


def read(said: Tensor) -> tuple[list[int], list[int], list[float], list[float]]:
    """What a head said, waited for: the tokens picked, the likeliest ones, max and lse."""
    here = said.cpu()
    return (*here[:MAX].tolist(), *here[MAX:].view(torch.float32).tolist())


class RecordedPass:
    """One pass over a batch of one shape, its tokens picked by the head.

    Recording runs the pass: `buffer` and `picks` hold ones that can be run.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        buffer: BatchBuffer,
        picks: PickBuffer,
        vocab: int,
        recorder: Recorder,
    ) -> None:
        self.buffer = buffer
        self.picks = picks
        # What the rows said: see `lm_head`.
        self.said = torch.empty((LINES, buffer.shape.answers), dtype=torch.int32, device=decoder.device)

        def run() -> None:
            answer(decoder, cache, buffer.batch, picks.picks, vocab, self.said)

        self.replay = recorder.record(run)


class RecordedPath:
    """Passes of one row a sequence, each row's token the one that the row before it picked."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        buffers: Sequence[BatchBuffer],
        picks: Sequence[PickBuffer],
        first: Tensor,
        vocab: int,
        recorder: Recorder,
    ) -> None:
        """`first`: [seqs] int32 on the device, the tokens of the first pass; `buffers` and `picks`: for each
        pass, of one shape and filled, but for the ids.
        """
        self.buffers = buffers
        self.picks = picks
        self.first = first
        # What each pass said: see `lm_head`.
        self.said = torch.empty((len(buffers), LINES, len(first)), dtype=torch.int32, device=first.device)

        def run() -> None:
            tokens = first
            for buffer, picked, out in zip(buffers, picks, self.said, strict=True):
                answer(decoder, cache, replace(buffer.batch, ids=tokens), picked.picks, vocab, out)
                tokens = out[TOKEN]

        self.replay = recorder.record(run)


def padded(works: Sequence[Work], block_size: int) -> BatchShape | None:
    """The smallest shape with a recording that holds the works, with one sequence more for the rows that pad
    it; None where a pass is not worth recording.
    """
    shape = shape_of(works, block_size)
    # The padding, less than MAX_GAP rows, is a sequence and needs a block table like any other.
    width = max(shape.width, -(-MAX_GAP // block_size))
    if (
        max(work.end - work.start for work in works) > MAX_ROWS
        or shape.rows > SIZES[-1]
        or width > WIDTHS[-1]
    ):
        return None
    rows, answers = at_least(SIZES, shape.rows), at_least(SIZES, max(shape.answers, 1))
    return BatchShape(rows, at_least(SIZES, shape.seqs) + 1, at_least(WIDTHS, width), answers)


def path_shape(shape: BatchShape, works: Sequence[Work], steps: int, block_size: int) -> BatchShape:
    """The shape of the passes of a path of `steps` tokens behind works in a batch of that shape: all go along
    to its end, those that want less of it, too.
    """
    end = max(work.end for work in works) + steps
    width = at_least(WIDTHS, max(shape.width, -(-end // block_size)))
    return BatchShape(shape.seqs - 1, shape.seqs, width, shape.seqs - 1)


def at_least(sizes: tuple[int, ...], size: int) -> int:
    """The smallest of `sizes` that is no smaller than `size`."""
    return next(known for known in sizes if known >= size)
