"""A device that records, simulated: the real recordings, cycles and their overlap over a fake model.

All that the device half does between the scheduler and a model is the shipped code: batches, recorded passes
and paths, whole cycles, and what the host believes to be in flight.  Fake are the model, a hash of the prefix
read through the block tables from the real paged cache, and the device: what is started runs later, as far as
a schedule drawn from a seed lets it, at the latest when somebody waits for it.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from nudging.api.loading import foresee
from nudging.core.fast_path import FastPath
from nudging.core.rows import Row, Rows
from nudging.core.sampling_params import SamplingParams
from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.errors import NumericalError
from nudging.executor.cycles.cycle_cache import CycleCache
from nudging.executor.cycles.recorded_cycle import RecordedCycle
from nudging.executor.graph_runner import GraphRunner
from nudging.executor.model_runner import ModelRunner, by_work
from nudging.kernels.lm_head import ARGMAX, LINES, LSE, MAX, TOKEN
from nudging.models.batch import Batch
from nudging.models.kv_cache import KVCache
from tests.support.simulated import (
    VOCAB,
    FakeModel,
    Setup,
    SimClock,
    SimLLM,
    draw,
)

SAMPLED = SamplingParams(temperature=1.0)


class CycleModel(FakeModel):
    """A FakeModel whose probabilities come as a head says them."""

    def peak(self, state: int) -> float:
        """The largest logit, where all of them sum up to a log-sum-exp of 0: fp32, as a head says it."""
        return float("nan") if self.is_nan(state) else float(np.float32(math.log(super().top_prob(state))))

    def top_prob(self, state: int) -> float:
        return math.exp(self.peak(state))


@dataclass(frozen=True)
class CycleConfig:
    max_len: int
    vocab_size: int
    num_layers: int = 1
    num_kv_heads: int = 1
    head_dim: int = 1
    final_soft_cap: float = 0.0


class CycleDecoder:
    """A CycleModel as a decoder: every row reads all that stands before it through its block table.

    In the cache a token's key is its id (+ 1), its value the state after it, both as bits.
    """

    dtype = torch.float32
    device = torch.device("cpu")
    weight_bytes = 1000
    head_share = 0.5
    precision = "of integers"

    def __init__(self, model: CycleModel, max_len: int) -> None:
        self.model, self.vocab = model, model.vocab
        self.config = CycleConfig(max_len, model.vocab)
        # What a head is given as its weight.
        self.weights: Any = mock.Mock(head=model)

    def before_head(self, batch: Batch, kv: KVCache) -> tuple[Tensor, None]:
        """The state after each row, in place of its activations: [rows] int64."""
        keys, values = (part.view(torch.int32).numpy().reshape(-1) for part in (kv.k, kv.v))
        ids, slots = batch.ids.reshape(-1).tolist(), batch.slot_mapping.tolist()
        ends, lengths, tables = (
            batch.cu_seqlens_q.tolist(),
            batch.seq_lens.tolist(),
            batch.block_tables.numpy(),
        )
        size, states = kv.block_size, []
        for index, length in enumerate(lengths):
            first, last = ends[index], ends[index + 1]
            for row in range(first, last):
                before = length - (last - row)
                state = self._read(keys, values, tables[index], before, size) if before > 0 else 0
                token = ids[row]
                state = crc32(bytes((token & 0xFF,)), state)
                keys[slots[row]], values[slots[row]] = token + 1, state - 2**31
                states.append(state)
        return torch.tensor(states), None

    def _read(self, keys: Any, values: Any, table: Any, length: int, size: int) -> int:
        """The state after the first `length` slots that a table leads to; another one where the last slot
        does not hold what these tokens come to.
        """
        at = (table[: -(-length // size), None] * size + np.arange(size)).reshape(-1)[:length]
        state = crc32((keys[at] - 1).astype(np.uint8).tobytes())
        last = int(values[at[-1]]) + 2**31
        return state if state == last else crc32(b"stale", last)


def head(
    x: Tensor, model: Any, vocab: int, cap: float, temperature: Tensor, seed: Tensor, position: Tensor,
    rows: Tensor, norm: None, out: Tensor,
) -> None:  # fmt: skip
    """`lm_head` over states."""
    states = x[rows].tolist()
    said = np.zeros((LINES, len(states)), dtype=np.int32)
    keys = zip(temperature.tolist(), seed.tolist(), position.tolist(), strict=False)
    for i, (state, (warmth, key, at)) in enumerate(zip(states, keys, strict=False)):
        said[ARGMAX, i] = said[TOKEN, i] = model.token(state, vocab)
        if warmth:
            said[TOKEN, i] = model.token(draw(state, SAMPLED, {}, key % 2**64, at), vocab)
        said[MAX, i] = np.float32(model.peak(state)).view(np.int32)
        said[LSE, i] = np.float32(0).view(np.int32)
    out.copy_(torch.from_numpy(said)[:, : out.shape[1]])


class Device:
    """Runs what was started in order, late: how far, between any two things the host does, is drawn.

    It stands in for a Recorder, too.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.clock = SimClock()
        self.queue: list[Callable[[], None]] = []
        self.cycles = self.ahead = self.recorded = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        # As a CUDA graph is: run once, and then captured.
        self.catch_up()
        self.recorded += 1
        run()
        return run

    def mark(self) -> Callable[[], None]:
        last = self.queue[-1] if self.queue else None

        def wait() -> None:
            self.ahead += bool(self.queue) and last is not self.queue[-1]
            if last in self.queue:
                self._run(self.queue.index(last) + 1)

        return wait

    def has_room(self) -> bool:
        return True

    def start(self, thunk: Callable[[], None]) -> None:
        self.queue.append(thunk)
        self.cycles += 1
        self.go_on()

    def go_on(self) -> None:
        """Some time passes: nothing, something or all that was started is done."""
        self.clock.now += self.rng.choice((0.1, 1.0, 3.0))
        self._run(self.rng.choice((0, 0, 1, len(self.queue))))

    def catch_up(self) -> None:
        self._run(len(self.queue))

    def _run(self, count: int) -> None:
        for thunk in self.queue[:count]:
            thunk()
        del self.queue[:count]


class SimPass(ModelRunner):
    """Passes as they are made where nothing is recorded."""

    passes = 0
    model: CycleModel

    def execute(
        self, works: list[Work], wanted: list[Wanted], fast_path: FastPath | None = None
    ) -> list[Rows | None]:
        self.cache.copy_blocks([pair for work in works for pair in work.copies])
        batch = self._builder.build(works, None)
        x, _ = self.decoder.before_head(batch, self.cache)
        states = x[batch.logit_rows].tolist()
        rows = [self.model.row(state, want) for state, want in zip(states, wanted, strict=True)]
        return [*by_work(rows, works)]


class SimGraphRunner(GraphRunner, SimPass):
    """The shipped runner of recordings over a fake model; its host half runs late, too."""

    def __init__(
        self, model: CycleModel, max_len: int, blocks: int, block_size: int, device: Device, caching: bool
    ) -> None:
        decoder: Any = CycleDecoder(model, max_len)
        super().__init__(decoder, blocks, block_size, device, caching)
        self.model, self.device = model, device
        self.poison()

    def execute(
        self, works: list[Work], wanted: list[Wanted], fast_path: FastPath | None = None
    ) -> list[Rows | None]:
        self.passes += 1
        self.device.go_on()
        return super().execute(works, wanted, fast_path)

    def _execute(self, works: list[Work], wanted: list[Wanted]) -> list[Row | NumericalError]:
        # A pass is read at once, and it runs behind all that was started.
        self.device.catch_up()
        return super()._execute(works, wanted)


@dataclass(frozen=True)
class CycleSetup(Setup):
    """Beside a Setup: `cycle_cache.PATIENCE`, and how often recordings are made while idle."""

    patience: int = 2
    record_ahead: float = 0.0


class CycleLLM(SimLLM):
    """An LLM whose fake models run from recordings, in one thread."""

    def __init__(self, setup: CycleSetup, device: Device) -> None:
        self.device = device
        super().__init__(setup)
        device.clock = self.clock

    def _runner(self, setup: Any, index: int) -> SimGraphRunner:
        seconds = (1.0, setup.guide_seconds)[index]
        size = VOCAB + index * setup.padding
        model = CycleModel(0x1234567 * index, size, setup.agreement, seconds, setup.nan_in)
        sizes = setup.max_len, setup.blocks[index], setup.block_size
        return SimGraphRunner(model, *sizes, self.device, setup.prefix_caching)

    def _foresee(self, runners: dict[str, Any]) -> None:
        foresee(runners, self.roles, self.clock)


@contextmanager
def late_device(device: Device, setup: CycleSetup, lengths: Callable[[int], int]) -> Iterator[None]:
    """Let recordings run on `device`; `lengths` says which length of drafts pays, given the longest."""
    launch, copy, record = RecordedCycle._launch, KVCache.copy_blocks, CycleCache._record

    def start(cycle: RecordedCycle, *args: Any) -> None:
        device.start(partial(launch, cycle, *args))

    def copied(cache: KVCache, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            device.catch_up()
        copy(cache, pairs)

    def recorded(book: CycleCache, shape: Any) -> RecordedCycle:
        # What it clears on the device it clears behind all that was started.
        device.catch_up()
        return record(book, shape)

    def length(ledger: Any, reader: str, rows: int, drafting: Any, limit: int) -> int:
        return min(lengths(limit), limit)

    patches = (
        mock.patch.object(RecordedCycle, "_launch", start),
        mock.patch.object(KVCache, "copy_blocks", copied),
        mock.patch.object(CycleCache, "_record", recorded),
        mock.patch("nudging.executor.cuda_graphs.lm_head", head),
        mock.patch("nudging.core.speculation.drafting.draft_length", length),
        mock.patch("nudging.executor.cycles.cycle_cache.PATIENCE", setup.patience),
    )
    with torch.inference_mode():
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
