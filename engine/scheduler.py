"""Which tokens each model computes in the next step: data only, decided from needs and budgets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from nudging.blocks import BlockPool
from nudging.request import Request
from nudging.sequence import Sequence

# A request with at most this many tokens to compute is being written, not read: it goes before long prompts.
DECODE_TOKENS = 32


@dataclass(frozen=True)
class Work:
    """Compute `tokens[start:end]` of one sequence; return the rows after `tokens[:p]` for p in
    first_row..end.
    """

    request: Request
    role: str
    start: int
    end: int
    first_row: int


@dataclass(frozen=True)
class SchedulerOutput:
    """One step: the work of each model, by the model's name."""

    works: dict[str, list[Work]]


class Scheduler:
    """First come, first served.  A request is admitted when every pool it uses can hold it to its end."""

    def __init__(self, pools: dict[str, BlockPool], models_of: dict[str, str], max_batch_tokens: int) -> None:
        self.pools = pools
        self.models_of = models_of
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._reserved = dict.fromkeys(pools, 0)
        # Sequences of open generations that no running request uses, the longest unused first.
        self._kept: list[Sequence] = []

    def blocks_needed(self, request: Request) -> dict[str, int]:
        """The most blocks of each model's pool that the request can ever own.

        One block more for each sequence than its tokens fill: a fork may have to copy its last block.
        """
        needed = dict.fromkeys(self.pools, 0)
        for role in request.policy.roles:
            model = self.models_of[role]
            needed[model] += self.pools[model].blocks_for(request.max_sequence(role)) + 1
        return needed

    def admit(self) -> list[Request]:
        """Move requests from the head of the queue to the running ones while memory lasts."""
        admitted = []
        while self.waiting:
            needed = self.blocks_needed(self.waiting[0])
            if any(self._reserved[m] + n > self.pools[m].total for m, n in needed.items()):
                break
            # Now that its memory is reserved nobody else may reclaim it.
            for sequence in self.waiting[0].sequences.values():
                self.take(sequence)
            self._reclaim(needed)
            for model, count in needed.items():
                self._reserved[model] += count
            admitted.append(self.waiting.popleft())
        self.running += admitted
        return admitted

    def keep(self, sequence: Sequence) -> None:
        """Leave a sequence its blocks while nobody uses it, until they are needed elsewhere."""
        self.take(sequence)
        self._kept.append(sequence)

    def take(self, sequence: Sequence) -> None:
        """A kept sequence is in use again, or gone."""
        self._kept = [kept for kept in self._kept if kept is not sequence]

    def _reclaim(self, needed: dict[str, int]) -> None:
        """Release kept sequences until what is reserved and `needed` fits beside the rest."""
        for model, count in needed.items():
            pool = self.pools[model]
            mine = [kept for kept in self._kept if kept.block_table.pool is pool]
            held = sum(len(kept.block_table.ids) for kept in mine)
            for kept in mine:
                if self._reserved[model] + count + held <= pool.total:
                    break
                held -= len(kept.block_table.ids)
                kept.release()

    def retire(self, request: Request) -> None:
        """Take a finished request out, wherever it stands."""
        if request in self.running:
            self.running.remove(request)
            for model, count in self.blocks_needed(request).items():
                self._reserved[model] -= count
        else:
            self.waiting.remove(request)

    def schedule(self) -> SchedulerOutput:
        """The tokens that the running requests' needs ask for, at most `max_batch_tokens` for each model."""
        works: dict[str, list[Work]] = {}
        left = dict.fromkeys(self.pools, self.max_batch_tokens)
        for request in self._short_ones_first():
            need = request.need_now
            model = self.models_of[need.role]
            start = request.sequences[need.role].num_computed
            end = min(need.last, start + left[model])
            if end > start:
                left[model] -= end - start
                works.setdefault(model, []).append(Work(request, need.role, start, end, need.first))
        return SchedulerOutput(works)

    def _short_ones_first(self) -> Iterable[Request]:
        def is_long(request: Request) -> bool:
            need = request.need_now
            pending = need.last - request.sequences[need.role].num_computed
            return pending > DECODE_TOKENS

        return sorted(self.running, key=is_long)
