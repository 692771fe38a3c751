"""How many tokens to draft: never dearer than drafting nothing, and as fast as the agreement allows.

Lazy nudging (no drafts) pays for exactly the rows that the policy asks for.  A ledger keeps that sum beside
what was really paid, for each request and for all of them together.  Many requests share a pass: each pays
for its rows the price they have in a pass of as many as run now, so that sums of prices are seconds of the
device.  A draft of k tokens may waste at most what drafting it costs (passes of the guide, but for tokens
that it has said already; a looked-up draft is free) and the longer pass of the model that reads it.  It is
made only where, even if all of it is wasted,

- all requests together have cost at most 2 % more than lazy, over the engine's whole life;
- this one has cost at most 2 % more than lazy and one pass of its dearest model (LOAN).

So the guarantee holds for every text.  What good drafts save pays for the first drafts of the next texts, and
a text that agrees with nobody cannot spend more of it than its loan.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nudging.core.speculation.shared_floats import Number

# What drafting may ever cost beyond lazy, as a share of lazy's own cost.
ALLOWANCE = 0.02
# What one request may borrow of what others saved, in one-row passes of its dearest model: the time of about
# one token.  More would hardly make good texts faster (benchmarks/LOG.md), and bad ones slower.
LOAN = 1.0
# Where many share a pass that would be the time of many tokens: then it is as much as so many take.
CROWD_LOAN = 2.0
# The agreement to try the first drafts with, unless the texts before agreed more.
PRIOR_AGREEMENT = 0.8
# A draft has to promise this many times lazy's tokens per second: estimates of costs and agreement err.
GAIN = 1.05
# One pass verifies up to 16 rows at about the price of one.
MAX_ADAPTIVE_DRAFT = 15
# More rows than anybody would compute in advance.
MANY_ROWS = 1000
# How fast the estimate of agreement forgets, per drafted token.
FORGETTING = 0.05


class Costs(Protocol):
    """What passes of one model cost."""

    def of(self, rows: float, answers: float) -> float:
        """The cost of a pass of `rows` rows, `answers` of which are answered, in any unit of time."""


@dataclass(frozen=True)
class Drafting:
    """What a draft takes: `free` tokens are known already, the next one is a pass of `lag` rows of the role
    `drafter`, and each further one a pass of one row.
    """

    drafter: str
    free: int
    lag: int = 1


class Account:
    """What the adaptive requests of an engine on the same models cost together.

    `owed`: what the passes that are planned and not made yet will cost at most.
    """

    lazy, paid, owed, agreement = map(Number, range(4))

    def __init__(self, lazy: float = 0.0, agreement: float = PRIOR_AGREEMENT) -> None:
        self.numbers = array("d", (lazy, 0.0, 0.0, agreement))

    @property
    def budget(self) -> float:
        """What may be wasted now without all being dearer than lazy by more than the allowance."""
        return (1 + ALLOWANCE) * self.lazy - self.paid - self.owed


class Ledger:
    """The costs of one request so far: what lazy would have paid for its rows, and what was paid.

    All of it goes into the shared `account`, too.  csrc/host/ledger.cpp is its twin.
    """

    # `_owed`: of what is planned.  `_last_role`, `_last_rows`, `_last_price`: the rows that were asked for
    # last (role -1: none yet), and `_open`: of their price, what no pass was made for since.
    lazy, paid, agreement, _owed, _open, _last_role, _last_rows, _last_price = map(Number, range(8))

    def __init__(
        self,
        costs: Mapping[str, Costs],
        account: Account | None = None,
        lazy: float = 0.0,
        agreement: float = 0.0,
    ) -> None:
        self.costs = costs
        self.account = account or Account()
        # One text that agreed with nobody says little about the next: the estimate starts low for none.
        agreement = agreement or max(PRIOR_AGREEMENT, self.account.agreement)
        # Behind the ones above, for each role: how far it was asked, and how many requests share its passes,
        # this one among them.
        self.numbers = array("d", (lazy, 0.0, agreement, 0.0, 0.0, -1.0, 0.0, 0.0, *(0.0, 1.0) * len(costs)))
        self._roles = list(costs)
        self._places = {role: 8 + 2 * index for index, role in enumerate(costs)}

    def price(self, role: str, rows: int, answers: int, sharers: float | None = None) -> float:
        """A request's share of a pass in which all have so many rows and answers: all that share the role's
        passes now, or `sharers`.
        """
        count = sharers or self.sharers(role)
        return self.costs[role].of(rows * count, answers * count) / count

    def sharers(self, role: str) -> float:
        """How many requests share the passes of the role."""
        return self.numbers[self._places[role] + 1]

    def share(self, sharers: Mapping[str, float]) -> None:
        """So many requests share the passes of each role from now on: what is asked for is priced anew.

        Not between the plan of a draft and its end, so that what was affordable stays so.
        """
        for role, place in self._places.items():
            self.numbers[place + 1] = sharers[role]
        self._price_anew()

    def _price_anew(self) -> None:
        """What lazy has yet to pay it pays at the prices of now, as whoever drafts does."""
        if self._open:
            before, self._last_price = self._last_price, self._price_of_last()
            self._expect(self._open * (self._last_price / before - 1))

    def _role_of_last(self) -> str | None:
        return self._roles[int(self._last_role)] if self._last_role >= 0 else None

    def _price_of_last(self) -> float:
        return self.price(self._roles[int(self._last_role)], int(self._last_rows), 1)

    def _expect(self, cost: float) -> None:
        """Lazy will pay so much more, for what was asked for last."""
        self._open += cost
        self.lazy += cost
        self.account.lazy += cost

    def ask(self, role: str, position: int) -> None:
        """The policy asks for the row after `position` tokens: lazy would now compute what leads up to it."""
        place = self._places[role]
        rows = position - int(self.numbers[place])
        if rows > 0:
            self.numbers[place] = position
            self._last_role, self._last_rows, self._open = self._roles.index(role), rows, 0.0
            self._last_price = self._price_of_last()
            self._expect(self._last_price)

    def rewind(self, role: str, position: int | None) -> None:
        """What `role` had read from `position` on was replaced; lazy has to compute it again, too."""
        place = self._places[role]
        if position is not None and position < self.numbers[place]:
            self.numbers[place] = position

    def spare(self, role: str, position: int, rows: int) -> None:
        """`rows` rows up to `position` were there already: lazy need not compute them either."""
        place = self._places[role]
        asked = int(self.numbers[place])
        if asked > position:
            self._price_anew()
            if role == self._role_of_last():
                # The row that was asked for is computed in any case.
                before, self._last_rows = self._last_price, max(self._last_rows - rows, 1)
                self._last_price = self._price_of_last()
                self._expect(max(self._last_price - before, -self._open))
            else:
                saved = self.price(role, asked, 1) - self.price(role, asked - rows, 1)
                self.lazy -= saved
                self.account.lazy -= saved
        else:
            self.numbers[place] = position

    def plan(self, cost: float) -> None:
        """The passes until the policy can go on will cost so much at most; earlier plans are done with."""
        self.account.owed += cost - self._owed
        self._owed = cost

    def pay(self, role: str, rows: int, answers: int) -> None:
        """A pass that read `rows` rows of the request and answered `answers` of them was made."""
        self._price_anew()
        cost = self.price(role, rows, answers)
        if not answers and role == self._role_of_last() and rows < self._last_rows:
            # A part of a prompt: lazy would have been given no more room in this pass either.
            self._last_rows -= rows
            self._last_price = self._price_of_last()
            self._expect(cost + self._last_price - self._open)
        self.paid += cost
        self.account.paid += cost
        self.plan(max(self._owed - cost, 0.0))
        self._open = max(self._open - cost, 0.0)

    def close(self, whole: bool) -> None:
        """No more passes will come.  If the text is not whole, nobody paid for the row it waited for."""
        self.plan(0.0)
        if not whole:
            self._expect(-self._open)

    def learn(self, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` tokens became text; those behind the first wrong one say nothing."""
        for survived in [True] * accepted + [False] * (accepted < drafted):
            self.agreement += FORGETTING * (survived - self.agreement)
            self.account.agreement += FORGETTING * (survived - self.account.agreement)

    @property
    def budget(self) -> float:
        """What may be wasted now: of what all have saved, no more than this request may borrow."""
        return min(self.account.budget + self._owed, self._own_budget)

    @property
    def _own_budget(self) -> float:
        """What this request has saved, and its loan."""
        dearest = max(self.costs, key=lambda role: self.costs[role].of(1, 1))
        loan = LOAN * min(self.costs[dearest].of(1, 1), CROWD_LOAN * self.price(dearest, 1, 1))
        return (1 + ALLOWANCE) * self.lazy - self.paid + loan

    def affordable_rows(self, role: str, running: int) -> int:
        """How many answered rows of a role may be computed besides what is planned, were all of so many
        requests to do so.
        """
        spare = min(self.account.budget / running, self._own_budget - self._owed)
        return int(min(max(spare, 0.0) / self.price(role, 1, 1), MANY_ROWS))


def drafting_cost(ledger: Ledger, drafting: Drafting, length: int, sharers: float | None = None) -> float:
    """The price of a draft of `length` tokens, before anybody reads it; see `Ledger.price`."""
    made = length - drafting.free
    if made <= 0:
        return 0.0
    first = ledger.price(drafting.drafter, drafting.lag, 1, sharers)
    return first + (made - 1) * ledger.price(drafting.drafter, 1, 1, sharers)


def draft_length(ledger: Ledger, reader: str, rows: int, drafting: Drafting, limit: int) -> int:
    """The draft length, 0 to `limit`, with the most tokens per second of those the ledger can afford.

    The role `reader` has `rows` tokens to compute before the first drafted one: 1 at the end of the text,
    more where it lags.  0 is lazy.

    What is fastest is judged as if all that share the reader's passes drafted alike: rows that are free for
    one request are dear where many fill a pass, and a pass of the drafter is cheap where many share it.  What
    a lagging reader has to catch up with it reads with or without a draft.
    """
    budget, crowd = ledger.budget, ledger.sharers(reader)
    best, best_rate = 0, GAIN / ledger.price(reader, 1, 1)
    for length in range(1, min(limit, MAX_ADAPTIVE_DRAFT) + 1):
        tokens = expected_tokens(length, ledger.agreement)
        read = ledger.price(reader, 1 + length, 1 + length)
        if tokens <= best_rate * read:
            # Not if drafting were free: what most lengths come to in a crowd.
            continue
        if drafting_cost(ledger, drafting, length) + ledger.price(reader, rows + length, 1 + length) > budget:
            break
        rate = tokens / (drafting_cost(ledger, drafting, length, crowd) + read)
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def expected_tokens(length: int, agreement: float) -> float:
    """Tokens a cycle of `length` drafts yields: 1 + a + ... + a^length (arXiv 2211.17192, equation 1)."""
    return length + 1.0 if agreement == 1 else (1 - agreement ** (length + 1)) / (1 - agreement)
