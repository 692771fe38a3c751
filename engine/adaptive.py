"""How many tokens to draft: never dearer than drafting nothing, and as fast as the agreement allows.

Lazy nudging (no drafts) pays for exactly the rows that the policy asks for.  A ledger keeps that sum beside
what was really paid, for each request and for all of them together.  A draft of k tokens may waste at most
what drafting it costs (passes of the guide; a looked-up draft is free) and the longer pass of the model that
reads it.  It is made only where, even if all of it is wasted,

- all requests together have cost at most 2 % more than lazy, over the engine's whole life;
- this one has cost at most 2 % more than lazy and one pass of its dearest model (LOAN).

So the guarantee holds for every text.  What good drafts save pays for the first drafts of the next texts, and
a text that agrees with nobody cannot spend more of it than its loan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

# What drafting may ever cost beyond lazy, as a share of lazy's own cost.
ALLOWANCE = 0.02
# What one request may borrow of what others saved, in one-row passes of its dearest model: the time of about
# one token.  More would hardly make good texts faster (benchmarks/LOG.md), and bad ones slower.
LOAN = 1.0
# The agreement to try the first drafts with, unless the texts before agreed more.
PRIOR_AGREEMENT = 0.7
# One pass verifies up to 16 rows at about the price of one; longer drafts rarely survive.
MAX_ADAPTIVE_DRAFT = 8
# How fast the estimate of agreement forgets, per drafted token.
FORGETTING = 0.05


class Costs(Protocol):
    """What passes of one model cost."""

    def of(self, rows: int) -> float:
        """The cost of a pass of `rows` rows, in any unit of time."""


@dataclass
class Account:
    """What the adaptive requests of an engine on the same models cost together.

    `owed`: what the passes that are planned and not made yet will cost at most.
    """

    lazy: float = 0.0
    paid: float = 0.0
    owed: float = 0.0
    agreement: float = PRIOR_AGREEMENT

    @property
    def budget(self) -> float:
        """What may be wasted now without all being dearer than lazy by more than the allowance."""
        return (1 + ALLOWANCE) * self.lazy - self.paid - self.owed


@dataclass
class Ledger:
    """The costs of one request so far: what lazy would have paid for its rows, and what was paid.

    All of it goes into the shared `account`, too.
    """

    costs: Mapping[str, Costs]
    account: Account = field(default_factory=Account)
    lazy: float = 0.0
    paid: float = 0.0
    agreement: float = 0.0
    _owed: float = 0.0
    # Of what lazy pays for the row that was asked for last: what no pass was made for since.
    _open: float = 0.0
    _asked: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # One text that agreed with nobody says little about the next: the estimate starts low for none.
        self.agreement = self.agreement or max(PRIOR_AGREEMENT, self.account.agreement)

    def ask(self, role: str, position: int) -> None:
        """The policy asks for the row after `position` tokens: lazy would now compute what leads up to it."""
        rows = position - self._asked.get(role, 0)
        if rows > 0:
            cost = self.costs[role].of(rows)
            self.lazy += cost
            self.account.lazy += cost
            self._asked[role] = position
            self._open = cost

    def rewind(self, role: str, position: int | None) -> None:
        """What `role` had read from `position` on was replaced; lazy has to compute it again, too."""
        if position is not None and position < self._asked.get(role, 0):
            self._asked[role] = position

    def spare(self, role: str, position: int, rows: int) -> None:
        """`rows` rows up to `position` were there already: lazy need not compute them either."""
        asked = self._asked.get(role, 0)
        if asked > position:
            saved = self.costs[role].of(asked) - self.costs[role].of(asked - rows)
            self.lazy -= saved
            self.account.lazy -= saved
        else:
            self._asked[role] = position

    def plan(self, cost: float) -> None:
        """The passes until the policy can go on will cost so much at most; earlier plans are done with."""
        self.account.owed += cost - self._owed
        self._owed = cost

    def pay(self, role: str, rows: int) -> None:
        """A pass of `rows` rows was made."""
        cost = self.costs[role].of(rows)
        self.paid += cost
        self.account.paid += cost
        self.plan(max(self._owed - cost, 0.0))
        self._open = max(self._open - cost, 0.0)

    def close(self, whole: bool) -> None:
        """No more passes will come.  If the text is not whole, nobody paid for the row it waited for."""
        self.plan(0.0)
        if not whole:
            self.lazy -= self._open
            self.account.lazy -= self._open

    def learn(self, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` tokens became text; those behind the first wrong one say nothing."""
        for survived in [True] * accepted + [False] * (accepted < drafted):
            self.agreement += FORGETTING * (survived - self.agreement)
            self.account.agreement += FORGETTING * (survived - self.account.agreement)

    @property
    def budget(self) -> float:
        """What may be wasted now: of what all have saved, no more than this request may borrow."""
        loan = LOAN * max(cost.of(1) for cost in self.costs.values())
        own = (1 + ALLOWANCE) * self.lazy - self.paid + loan
        return min(self.account.budget + self._owed, own)


def draft_length(ledger: Ledger, reader: str, rows: int, drafting: Callable[[int], float], limit: int) -> int:
    """The draft length, 0 to `limit`, with the most tokens per second of those the ledger can afford.

    The role `reader` has `rows` tokens to compute before the first drafted one: 1 at the end of the text,
    more where it lags.  `drafting(n)` is the cost of drafting n tokens.  0 is lazy.
    """
    model, budget = ledger.costs[reader], ledger.budget
    best, best_rate = 0, 1 / model.of(rows)
    for length in range(1, min(limit, MAX_ADAPTIVE_DRAFT) + 1):
        cost = drafting(length) + model.of(rows + length)
        if cost > budget:
            break
        rate = expected_tokens(length, ledger.agreement) / cost
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def expected_tokens(length: int, agreement: float) -> float:
    """Tokens a cycle of `length` drafts yields: 1 + a + ... + a^length (arXiv 2211.17192, equation 1)."""
    return sum(agreement**i for i in range(length + 1))
