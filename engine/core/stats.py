"""What an engine has done since it was made, and how full it is now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from nudging.core.request import Request


@dataclass
class Totals:
    """Sums over requests.

    `tokens` and `passes` are by role; a pass is one forward of a role's model in which a request had tokens,
    so that a pass which serves two requests counts twice.  `drafts` counts the drafts that were verified,
    `finished` the ended requests by finish reason.
    """

    prompt_tokens: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)

    @property
    def generated_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def nudge_rate(self) -> float:
        """The share of tokens that the base did not write; 0 before the first one."""
        total = self.generated_tokens
        return 1 - self.tokens.get("base", 0) / total if total else 0.0

    def add(self, request: Request) -> None:
        """Count what a request has cost so far."""
        counters = request.counters
        self.prompt_tokens += len(request.prompts[request.facts.roles[0]].ids)
        for piece in tuple(request.pieces):
            self.tokens[piece.author] = self.tokens.get(piece.author, 0) + 1
        for role, count in dict(counters.passes).items():
            self.passes[role] = self.passes.get(role, 0) + count
        self.drafts += sum(dict(counters.cycles).values())
        self.drafted += counters.drafted
        self.accepted += counters.accepted
        self.cached_tokens += counters.cached
        self.preemptions += counters.preemptions
        if request.finish_reason is not None:
            reason = request.finish_reason
            self.finished[reason] = self.finished.get(reason, 0) + 1

    def copy(self) -> Totals:
        """The sums as they are now."""
        return Totals(
            self.prompt_tokens,
            dict(self.tokens),
            dict(self.passes),
            self.drafts,
            self.drafted,
            self.accepted,
            self.cached_tokens,
            self.preemptions,
            dict(self.finished),
        )


class Tally:
    """Totals over the requests that have ended and those that run; read from any thread, each is seen once.

    A lock would be simpler, but one that an interrupted reader left taken would stop the engine.
    """

    def __init__(self) -> None:
        self._ended = Totals()
        self._running: dict[Request, None] = {}
        # Odd while a request goes over from those that run to those that have ended.
        self._moves = 0

    def begin(self, request: Request) -> None:
        self._running[request] = None

    def end(self, request: Request) -> None:
        """Also of a request that never ran."""
        self._moves += 1
        try:
            self._ended.add(request)
            self._running.pop(request, None)
        finally:
            self._moves += 1

    def totals(self) -> Totals:
        """The sums as they are now."""
        while True:
            before = self._moves
            totals, running = self._ended.copy(), tuple(self._running)
            if before % 2 == 0 and before == self._moves:
                break
            time.sleep(0)
        for request in running:
            totals.add(request)
        return totals


@dataclass(frozen=True)
class EngineStats:
    """One look at an engine: how many requests run and wait, the share of each model's cache that is in
    use, the precision of each model (and who reads its prompts, if not our kernels), and the totals so far,
    those of running requests included.
    """

    running: int
    waiting: int
    kv_cache_usage: Mapping[str, float]
    precision: Mapping[str, str]
    totals: Totals
