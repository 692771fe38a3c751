"""How many tokens to draft: never dearer than drafting nothing, and as fast as the agreement allows.

Lazy nudging (no drafts) pays for exactly the rows that the policy asks for.  A ledger keeps that sum beside
what was really paid.  A draft of k tokens may waste at most what drafting it costs (passes of the guide; a
looked-up draft is free) and the longer pass of the model that reads it; it is made only where the ledger
stays within 2 % of lazy even if all of it is wasted.  So the guarantee holds for every text, and what good
drafts save pays for the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

# What drafting may ever cost beyond lazy, as a share of lazy's own cost.
ALLOWANCE = 0.02
# One pass verifies up to 16 rows at about the price of one; longer drafts rarely survive.
MAX_ADAPTIVE_DRAFT = 8
# How fast the estimate of agreement forgets, per drafted token.
FORGETTING = 0.05


class Costs(Protocol):
    """What passes of one model cost."""

    def of(self, rows: int) -> float:
        """The cost of a pass of `rows` rows, in any unit of time."""


@dataclass
class Ledger:
    """The costs of one request so far: what lazy would have paid for its rows, and what was paid."""

    costs: Mapping[str, Costs]
    lazy: float = 0.0
    paid: float = 0.0
    agreement: float = 0.7
    _asked: dict[str, int] = field(default_factory=dict)

    def ask(self, role: str, position: int) -> None:
        """The policy asks for the row after `position` tokens: lazy would now compute what leads up to it."""
        rows = position - self._asked.get(role, 0)
        if rows > 0:
            self.lazy += self.costs[role].of(rows)
            self._asked[role] = position

    def rewind(self, role: str, position: int | None) -> None:
        """What `role` had read from `position` on was replaced; lazy has to compute it again, too."""
        if position is not None and position < self._asked.get(role, 0):
            self._asked[role] = position

    def spare(self, role: str, position: int, rows: int) -> None:
        """`rows` rows up to `position` were there already: lazy need not compute them either."""
        asked = self._asked.get(role, 0)
        if asked > position:
            self.lazy += self.costs[role].of(asked - rows) - self.costs[role].of(asked)
        else:
            self._asked[role] = position

    def pay(self, role: str, rows: int) -> None:
        """A pass of `rows` rows was made."""
        self.paid += self.costs[role].of(rows)

    def learn(self, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` tokens became text; those behind the first wrong one say nothing."""
        for survived in [True] * accepted + [False] * (accepted < drafted):
            self.agreement += FORGETTING * (survived - self.agreement)

    @property
    def budget(self) -> float:
        """What may be wasted now without being dearer than lazy by more than the allowance."""
        return (1 + ALLOWANCE) * self.lazy - self.paid


def draft_length(ledger: Ledger, reader: str, rows: int, drafting: Callable[[int], float], limit: int) -> int:
    """The draft length, 0 to `limit`, with the most tokens per second of those the ledger can afford.

    The role `reader` has `rows` tokens to compute before the first drafted one: 1 at the end of the text,
    more where it lags.  `drafting(n)` is the cost of drafting n tokens.  0 is lazy.
    """
    model = ledger.costs[reader]
    best, best_rate = 0, 1 / model.of(rows)
    for length in range(1, min(limit, MAX_ADAPTIVE_DRAFT) + 1):
        cost = drafting(length) + model.of(rows + length)
        if cost > ledger.budget:
            break
        rate = expected_tokens(length, ledger.agreement) / cost
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def expected_tokens(length: int, agreement: float) -> float:
    """Tokens a cycle of `length` drafts yields: 1 + a + ... + a^length (arXiv 2211.17192, equation 1)."""
    return sum(agreement**i for i in range(length + 1))
