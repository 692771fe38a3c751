"""The sums behind adaptive drafts, one by one: what lazy would have paid, what was paid, and what is owed."""

import pytest

from nudging.core.speculation.ledger import FORGETTING, LOAN, PRIOR_AGREEMENT, Account, Ledger
from nudging.core.speculation.pass_costs import BUCKETS, PassCosts
from tests.support.fake import FixedCosts

BASE, GUIDE = FixedCosts(1.0, 0.25), FixedCosts(0.25, 0.125)
COSTS = {"base": BASE, "guide": GUIDE}


def test_lazy_pays_once_for_what_leads_up_to_a_row() -> None:
    ledger = Ledger(COSTS)
    ledger.ask("base", 5)
    ledger.ask("base", 5)
    assert ledger.lazy == ledger.account.lazy == BASE.of(5, 1)
    ledger.ask("base", 7)
    ledger.ask("guide", 4)
    assert ledger.lazy == BASE.of(5, 1) + BASE.of(2, 1) + GUIDE.of(4, 1)
    for position in (None, 9):
        ledger.rewind("base", position)
        ledger.ask("base", 7)
    assert ledger.lazy == BASE.of(5, 1) + BASE.of(2, 1) + GUIDE.of(4, 1), "nothing it had read was replaced"
    ledger.rewind("base", 4)
    ledger.ask("base", 7)
    assert ledger.lazy == BASE.of(5, 1) + BASE.of(2, 1) + GUIDE.of(4, 1) + BASE.of(3, 1)


def test_what_was_there_before_it_was_asked_for_costs_lazy_nothing() -> None:
    ledger = Ledger(COSTS)
    ledger.spare("guide", 6, 6)
    ledger.ask("guide", 8)
    assert ledger.lazy == ledger.account.lazy == GUIDE.of(2, 1)


def test_what_is_found_of_one_role_is_nothing_that_another_was_asked_for() -> None:
    """Nor more than was asked for last: then the price of what is left to ask for would be none."""
    ledger = Ledger(COSTS)
    ledger.ask("guide", 8)
    ledger.ask("base", 3)
    ledger.spare("guide", 6, 6)
    assert ledger.lazy == ledger.account.lazy == GUIDE.of(2, 1) + BASE.of(3, 1)
    ledger.share({"base": 2.0, "guide": 2.0})
    ledger.ask("base", 5)
    before = ledger.lazy
    ledger.spare("base", 4, 4)
    assert before - ledger.lazy == pytest.approx(ledger.price("base", 2, 1) - ledger.price("base", 1, 1))
    ledger.share({"base": 1.0, "guide": 1.0})
    ledger.pay("base", 1, 1)
    assert ledger.lazy > 0


def test_what_is_planned_is_owed_until_it_is_paid() -> None:
    account = Account()
    ledger, other = Ledger(COSTS, account), Ledger(COSTS, account)
    ledger.plan(4.0)
    other.plan(1.0)
    other.plan(0.5)
    assert account.owed == 4.5, "of one request only the last plan counts"
    ledger.pay("base", 4, 1)
    assert (account.owed, account.paid, ledger.paid) == (2.5, 2.0, 2.0)
    ledger.pay("base", 8, 1)
    assert (account.owed, account.paid, ledger.paid) == (0.5, 5.0, 5.0), "it was dearer than planned"
    other.close(True)
    assert (account.owed, account.paid) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("rows", "whole", "lazy"),
    [(0, True, BASE.of(3, 1)), (0, False, 0.0), (1, False, BASE.of(1, 1)), (9, False, BASE.of(3, 1))],
)
def test_of_a_text_that_was_given_up_lazy_pays_what_was_paid_for_its_last_row(
    rows: int, whole: bool, lazy: float
) -> None:
    ledger = Ledger(COSTS)
    ledger.ask("base", 3)
    if rows:
        ledger.pay("base", rows, 1)
    ledger.close(whole)
    assert ledger.lazy == ledger.account.lazy == lazy


@pytest.mark.parametrize(
    ("drafted", "accepted", "lessons"), [(4, 2, (1, 1, 0)), (3, 3, (1, 1, 1)), (2, 0, (0,)), (0, 0, ())]
)
def test_tokens_up_to_the_first_wrong_one_teach_how_much_the_models_agree(
    drafted: int, accepted: int, lessons: tuple[int, ...]
) -> None:
    ledger = Ledger(COSTS, Account(agreement=0.9))
    other, expected = Ledger(COSTS, ledger.account), 0.9
    ledger.learn(drafted, accepted)
    for survived in lessons:
        expected = (1 - FORGETTING) * expected + FORGETTING * survived
    assert ledger.agreement == ledger.account.agreement == pytest.approx(expected)
    assert other.agreement == 0.9, "texts differ"


def test_a_text_starts_with_the_agreement_of_those_before_but_not_low() -> None:
    assert Ledger(COSTS, Account(agreement=0.9)).agreement == 0.9
    assert Ledger(COSTS, Account(agreement=0.2)).agreement == PRIOR_AGREEMENT


def test_the_budget_is_what_all_have_saved_and_no_more_than_a_loan() -> None:
    rich = Ledger(COSTS, Account(lazy=100.0), lazy=10.0)
    rich.paid = 8.0
    assert rich.budget == pytest.approx(1.02 * 10 - 8 + LOAN * BASE.of(1, 1))
    poor = Ledger(COSTS, Account(lazy=10.0), lazy=10.0)
    poor.paid = poor.account.paid = 8.0
    poor.account.owed = 2.0
    assert poor.budget == pytest.approx(1.02 * 10 - 8 - 2)
    poor.plan(1.5)
    assert poor.budget == pytest.approx(1.02 * 10 - 8 - 2), "its own plan may still be changed"


def test_in_a_crowd_everyone_pays_a_share_of_passes_with_the_rows_of_all() -> None:
    ledger = Ledger(COSTS)
    ledger.share({"base": 3.0, "guide": 1.0})
    assert ledger.price("base", 2, 1) == BASE.of(6, 3) / 3
    assert ledger.price("base", 2, 1, sharers=2.0) == BASE.of(4, 2) / 2
    assert ledger.price("guide", 2, 1) == GUIDE.of(2, 1)


def test_what_was_asked_for_is_priced_anew_when_others_come() -> None:
    ledger = Ledger(COSTS)
    ledger.ask("base", 4)
    ledger.share({"base": 4.0, "guide": 1.0})
    assert ledger.lazy == ledger.account.lazy == pytest.approx(BASE.of(16, 4) / 4)


def test_who_drafts_nothing_never_pays_more_than_lazy_whatever_is_learned_of_prices() -> None:
    costs = {"base": PassCosts(10**10, 0.25), "guide": PassCosts(10**9, 0.25)}
    account = Account()
    first, second = Ledger(costs, account), Ledger(costs, account)
    for ledger in (first, second):
        ledger.share({"base": 2.0, "guide": 1.0})
        ledger.ask("base", 40)
    second.spare("base", 16, 16)
    costs["base"].record(64, 2, 7.0)
    first.pay("base", 24, 0)
    costs["base"].record(32, 2, 5.0)
    for ledger, rows in ((first, 16), (second, 24)):
        ledger.pay("base", rows, 1)
        ledger.ask("base", 41)
    costs["base"].record(2, 2, 0.5)
    for ledger in (first, second):
        ledger.pay("base", 1, 1)
    assert second.paid == pytest.approx(second.lazy)
    assert account.budget >= 0.0


def test_passes_of_any_size_are_timed() -> None:
    small = PassCosts(10**10, 0.25)
    small.record(1, 1, 0.5)
    small.record(3, 3, 0.9)
    assert (small.of(1, 1), small.of(3, 3)) == (0.5, 0.9)
    costs = PassCosts(10**10, 0.25)
    for rows in (2**BUCKETS, 2 ** (BUCKETS + 6)):
        costs.record(rows, rows, 7.0)
    assert costs.of(2**BUCKETS, 2**BUCKETS) == 7.0
