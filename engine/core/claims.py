"""How many blocks requests will need beside those they hold: what admission leaves room for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nudging.core.block_pool import BlockPool
from nudging.core.fast_path import FastPath
from nudging.core.ranked import Ranked
from nudging.core.request import Request

# Room to grow, in blocks, that admission leaves to each sequence: preemption is for what nobody foresaw.
HEADROOM_BLOCKS = 1


class Claims:
    """What requests claim of each pool.

    The running ones are asked once for all that are admitted after them in a step, so admission costs what
    it admits, however many run; those who are carried are asked together, in C++.
    """

    def __init__(
        self,
        pools: Mapping[str, BlockPool],
        models_of: Mapping[str, str],
        fast_path: FastPath,
        running: Ranked,
    ) -> None:
        self._pools = pools
        self._models_of = models_of
        self._fast_path = fast_path
        self._running = running
        # Of all running requests together, as long as nothing has changed that they depend on.
        self._sum: dict[str, int] | None = None

    def of(self, request: Request) -> dict[str, int]:
        """The blocks the request does not hold and will need soon: for its text, what is written ahead of it,
        and some growth.
        """
        claim = dict.fromkeys(self._pools, 0)
        for role in request.facts.roles:
            there = request.num_blocks(role) or self._count_known(request, role)
            claim[self._models_of[role]] += max(self._soon(request, role) - there, 0)
        return claim

    def of_running(self) -> dict[str, int]:
        """The claims of all running requests together."""
        if self._sum is None:
            self._sum = self._of_carried()
            for request in self._running:
                if not request.is_carried:
                    add(self._sum, self.of(request))
        return self._sum

    def of_all(self, requests: Iterable[Request]) -> dict[str, int]:
        """The claims of `requests` together."""
        total = dict.fromkeys(self._pools, 0)
        for request in requests:
            add(total, self.of(request))
        return total

    def admit(self, claim: dict[str, int]) -> None:
        """A request that claims so much is one of the running ones now.

        No other's claim changes with it: it holds no block yet, and a prompt that it shares with others is
        claimed by the highest-ranked of them.
        """
        if self._sum is not None:
            add(self._sum, claim)

    def forget(self) -> None:
        """Blocks were written or given back since: the running requests have to be asked again."""
        self._sum = None

    def short(
        self, claim: Mapping[str, int], beside: Mapping[str, int], free: Mapping[str, int]
    ) -> list[BlockPool]:
        """The pools whose free blocks do not hold `claim` beside the claims `beside`."""
        return [pool for model, pool in self._pools.items() if free[model] < claim[model] + beside[model]]

    def _of_carried(self) -> dict[str, int]:
        """The claims of those who are carried; where they hold nothing yet, less what they will share."""
        total, without_blocks = self._fast_path.claims(HEADROOM_BLOCKS)
        for request, role in without_blocks:
            soon = self._soon(request, role)
            total[self._models_of[role]] -= min(self._count_known(request, role), soon)
        return total

    def _soon(self, request: Request, role: str) -> int:
        """How many blocks the role's sequence will soon have."""
        pool = self._pools[self._models_of[role]]
        soon = request.context_length(role) + request.ahead + HEADROOM_BLOCKS * pool.block_size
        return pool.blocks_for(min(soon, request.max_sequence(role)))

    def _count_known(self, request: Request, role: str) -> int:
        """How many blocks a sequence that has none will share with running requests."""
        pool = self._pools[self._models_of[role]]
        for sibling in request.siblings:
            if sibling is request or sibling not in self._running:
                continue
            # Of those who have read nothing yet, the highest-ranked reads the prompt for all, and claims it.
            if sibling.rank < request.rank or sibling.num_blocks(role):
                return (len(request.prompts[role].ids) - 1) // pool.block_size
        limit = request.context_length(role) - 1
        if request.is_carried:
            return self._fast_path.count_known(request, role, limit)
        return request.sequences[role].count_known(limit)


def add(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add `more` to `total`, model by model."""
    for model, count in more.items():
        total[model] += count
