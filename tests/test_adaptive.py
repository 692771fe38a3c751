"""Drafting as much as pays: the same text, never more than 2 % dearer than drafting nothing."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nudging import Nudging, SamplingParams
from nudging.adaptive import ALLOWANCE, Ledger, draft_length, expected_tokens
from nudging.costs import PassCosts
from nudging.prompts import RolePrompt
from nudging.request import Request
from tests.fake import FixedCosts, fake_engine

VOCAB = 32
PROMPT = [1, 2, 3]

# By output position: does the guide agree with the base, and is the base sure?
Trace = Callable[[int], bool]


def scripted(agrees: Trace, sure: Trace) -> dict[str, Callable[[list[int]], Tensor]]:
    """A base and a guide that follow traces: whatever was written, the base's word is a function of its
    position.
    """

    def row(token: int, prob: float) -> Tensor:
        logits = torch.zeros(VOCAB)
        logits[token] = math.log(prob / (1 - prob) * (VOCAB - 1))
        return logits

    def base(ids: list[int]) -> Tensor:
        t = len(ids) - len(PROMPT)
        return row((7 * t + 1) % VOCAB, 0.9 if sure(t) else 0.2)

    def guide(ids: list[int]) -> Tensor:
        t = len(ids) - len(PROMPT)
        return row((7 * t + (1 if agrees(t) else 2)) % VOCAB, 0.9)

    return {"base": base, "guide": guide}


def run(
    agrees: Trace, sure: Trace, guide_cost: float, row_cost: float, draft_len: int | None, length: int = 300
) -> tuple[list[int], list[str], Ledger]:
    costs = {"base": FixedCosts(1.0, row_cost), "guide": FixedCosts(guide_cost)}
    engine, roles = fake_engine(scripted(agrees, sure), costs)
    prompts = {name: RolePrompt(list(PROMPT)) for name in roles}
    policy, params = Nudging(0.4, "token"), SamplingParams(max_tokens=length)
    request = Request("r", policy, params, 0, prompts, roles, draft_len)
    engine.add(request)
    ledger = None
    while engine.has_work:
        engine.step()
        ledger = engine._ledgers.get("r", ledger)
        if ledger is not None and draft_len is None:
            assert ledger.paid <= (1 + ALLOWANCE) * ledger.lazy + 1e-9, "the promise holds at every step"
    assert ledger is not None
    assert request.error is None
    return request.output, [piece.author for piece in request.pieces], ledger


def pattern(seed: int, rate: float) -> Trace:
    rng = random.Random(seed)
    draws = [rng.random() < rate for _ in range(5000)]
    return lambda t: draws[t]


ADVERSARIES: dict[str, Trace] = {
    "never": lambda t: False,
    "always": lambda t: True,
    "alternating": lambda t: t % 2 == 0,
    "every ninth fails": lambda t: t % 9 != 8,
    "good then bad": lambda t: t < 60,
    "bad then good": lambda t: t >= 60,
    "bursts": lambda t: (t // 17) % 2 == 0,
    "lures": lambda t: (t // 5) % 3 != 2,
    "random .5": pattern(1, 0.5),
    "random .8": pattern(2, 0.8),
}


@pytest.mark.parametrize("guide_cost", [0.04, 0.16, 0.5, 1.0])
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adaptive_is_never_dearer_than_lazy_and_writes_the_same(name: str, guide_cost: float) -> None:
    for nudge_rate in (0.0, 0.1):
        agrees, sure = ADVERSARIES[name], pattern(3, 1 - nudge_rate)
        lazy = run(agrees, sure, guide_cost, 0.01, 0, length=100)
        auto = run(agrees, sure, guide_cost, 0.01, None, length=100)
        assert auto[:2] == lazy[:2], "drafts never change a token or an author"
        assert lazy[2].paid == pytest.approx(lazy[2].lazy), "lazy pays what the ledger says lazy pays"
        assert auto[2].lazy == pytest.approx(lazy[2].paid), "and the ledger knows it while drafting"
        assert auto[2].paid <= (1 + ALLOWANCE) * lazy[2].paid + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.booleans(), min_size=10, max_size=80),
    st.lists(st.booleans(), min_size=10, max_size=80),
    st.floats(0.02, 1.2),
    st.floats(0.0, 0.1),
)
def test_the_promise_holds_on_any_trace(
    agrees: list[bool], sure: list[bool], guide_cost: float, row_cost: float
) -> None:
    run(lambda t: agrees[t % len(agrees)], lambda t: sure[t % len(sure)], guide_cost, row_cost, None, 80)


def test_a_good_guide_makes_nudged_text_cheaper_than_the_base_alone() -> None:
    """At agreement .8, nudge rate .1 and a guide at a tenth of the base: at least 1.8 times as fast."""
    output, _, ledger = run(pattern(4, 0.8), pattern(5, 0.9), 0.1, 0.0, None, length=600)
    assert len(output) / ledger.paid > 1.8


def test_a_hopeless_guide_is_not_asked_again_and_again() -> None:
    output, _, ledger = run(lambda t: False, lambda t: True, 0.16, 0.0, None, length=300)
    assert ledger.paid <= 1.02 * len(output)


@pytest.mark.parametrize(("agreement", "guide", "best"), [(0.6, 0.165, 2), (0.8, 0.165, 4), (0.9, 0.04, 8)])
def test_the_length_with_the_most_tokens_per_second_is_chosen(
    agreement: float, guide: float, best: int
) -> None:
    ledger = Ledger({"base": FixedCosts(1.0), "guide": FixedCosts(guide)}, lazy=1e6, agreement=agreement)
    assert abs(draft_length(ledger, 1, 1, 100) - best) <= 1
    assert draft_length(ledger, 1, 1, 1) <= 1, "never beyond the limit"


def test_expected_tokens_is_the_geometric_sum() -> None:
    assert expected_tokens(4, 0.82) == pytest.approx((1 - 0.82**5) / (1 - 0.82))


def test_costs_start_from_the_weights_and_follow_the_clock() -> None:
    costs = PassCosts(10**10)
    assert costs.of(1) == 1.0
    costs.record(1, 0.5)
    assert costs.of(1) == 0.5
    assert costs.of(16) == 0.5, "until timed, more rows cost what fewer do"
    costs.record(16, 0.8)
    assert costs.of(16) == 0.8
    for _ in range(200):
        costs.record(1, 0.6)
    assert costs.of(1) == pytest.approx(0.6, rel=1e-3)
    costs.record(1, 0.2)
    assert costs.of(1) == 0.2, "a cold first timing does not stay"
