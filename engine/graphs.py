"""Passes recorded once and replayed, where starting a kernel takes longer than a small one runs.

A recording is a fixed sequence of kernels over fixed memory.  So a batch is padded to one of few shapes, its
buffer is filled and copied, and the replay does the rest.  A path (a guide's draft, its next word) is one
recording of several passes: each token goes from the statistics of one pass to the ids of the next on the
device, and the host waits once, at the end.

Nothing waits for a recording: a shape is run as it is when it first comes, and recorded when it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from nudging.batch import Batch, BatchBuffer, BatchShape, KVCache, shape_of
from nudging.kernels.softmax_stats import SoftmaxStats, softmax_stats
from nudging.scheduler import Work

# Rows of one sequence up to which a pass is recorded: what a draft and its pass have, not what a prompt has.
MAX_ROWS = 16
# Sizes that a recording is made for: all that are asked for in between are padded.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256,
         320, 384, 512)  # fmt: skip
MAX_GAP = max(b - a for a, b in pairwise(SIZES))
WIDTHS = tuple(8 << n for n in range(10))


class Recorder(Protocol):
    """How a device records."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run `run` and return what runs it again.

        `run` must allocate nothing that outlives it, never wait for the device, and find what it reads and
        writes at the same addresses every time.
        """


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        # Once as it is, on the stream that records: kernels are compiled and libraries set up.
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay


class Forward(Protocol):
    """A decoder's forward."""

    def __call__(self, batch: Batch, kv: KVCache) -> Tensor: ...


@dataclass(frozen=True)
class Answers:
    """What a pass said: `logits` [answers, vocab] fp32 and their statistics, still on the device."""

    logits: Tensor
    stats: SoftmaxStats


class RecordedPass:
    """One pass over a batch of one shape."""

    def __init__(self, buffer: BatchBuffer, forward: Forward, cache: KVCache, recorder: Recorder) -> None:
        """`buffer` holds a real batch: recording runs the pass."""
        self.buffer = buffer
        self.answers: Answers

        def run() -> None:
            logits = forward(buffer.batch, cache)
            self.answers = Answers(logits, softmax_stats(logits))

        self.replay = recorder.record(run)


class RecordedPath:
    """`steps` passes of one row a sequence, each row's token the likeliest one after the row before it."""

    def __init__(
        self,
        buffers: Sequence[BatchBuffer],
        first: Tensor,
        forward: Forward,
        cache: KVCache,
        recorder: Recorder,
    ) -> None:
        """`first`: [seqs] int64 on the device, the tokens of the first pass; `buffers`: one for each pass,
        of one shape and filled but for their ids.
        """
        self.buffers = buffers
        self.first = first
        # By pass and sequence: the likeliest token, and what its probability is made of.
        self.tokens = torch.empty((len(buffers), len(first)), dtype=torch.int32, device=first.device)
        self.peaks = torch.empty((len(buffers), 2, len(first)), dtype=torch.float32, device=first.device)

        def run() -> None:
            tokens = first
            for buffer, top, peak in zip(buffers, self.tokens, self.peaks, strict=True):
                buffer.batch.ids.copy_(tokens)
                stats = softmax_stats(forward(buffer.batch, cache))
                top.copy_(stats.argmax)
                peak[0].copy_(stats.max)
                peak[1].copy_(stats.lse)
                tokens = top

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
    rows, answers = _at_least(SIZES, shape.rows), _at_least(SIZES, max(shape.answers, 1))
    return BatchShape(rows, _at_least(SIZES, shape.seqs) + 1, _at_least(WIDTHS, width), answers)


def _at_least(sizes: tuple[int, ...], size: int) -> int:
    return next(known for known in sizes if known >= size)
