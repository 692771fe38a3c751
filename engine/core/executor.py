"""What the host half asks of the half that has the device; `nudging.executor` has the shipped one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from nudging.core.block_pool import BlockPool
from nudging.core.fast_path import FastPath
from nudging.core.past import Past
from nudging.core.rows import Rows, TokenLogprob
from nudging.core.sampling_params import SamplingParams
from nudging.core.speculation.pass_costs import CycleTime
from nudging.core.wanted import Wanted
from nudging.core.work import Work

# Recordings are made ahead for at most so many texts at once: all are kept, and a recording of a pass is
# some hundred kernels.
MAX_TEXTS = 64


class Sampler(Protocol):
    """Reads logits for the host half, which has no tensors."""

    def pick(
        self, logits: Any, vocab: int, params: SamplingParams, seed: int, position: int, past: Past
    ) -> int:
        """A token of one row of logits [vocab], with the noise of (seed, position).

        Raises BadRequest for what is no such row, NumericalError where none can be picked from it.
        """

    def logprob(self, logits: Any, token: int, num_top: int) -> TokenLogprob:
        """The log-probability of `token` under logits [vocab], and those of the `num_top` likeliest."""


class Executor(Protocol):
    """One model with its cache: computes what a step has planned for it."""

    pool: BlockPool
    # What the last cycle took that it computed, until somebody has taken note of it.
    cycle_time: CycleTime | None
    # How many passes the last `execute` took that such passes will take again.
    passes_made: int

    @property
    def sampler(self) -> Sampler: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def head_share(self) -> float: ...
    @property
    def takes_fast_path(self) -> bool: ...
    @property
    def precision(self) -> str: ...
    def execute(
        self, works: list[Work], wanted: list[Wanted], fast_path: FastPath | None = None
    ) -> list[Rows | None]:
        """For each work its rows, or None: this work is put off.  The device is done when it returns."""

    def record_ahead(self, texts: int) -> bool:
        """Record one more pass for a batch of so many texts; False where none is left."""

    def logits(self, ids: list[int]) -> Any:
        """What the model says after each prefix of `ids`: [len(ids), vocab] fp32, on the host."""

    def close(self) -> None:
        """Execute nothing any more."""


def record_ahead(executors: Iterable[Executor]) -> bool:
    """Make one more recording; False where none is left to be made."""
    executors = tuple(executors)
    return any(executor.record_ahead(texts) for texts in range(1, MAX_TEXTS + 1) for executor in executors)
