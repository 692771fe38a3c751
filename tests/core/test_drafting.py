"""Drafts one by one: what is proposed, what it costs, what of it is counted, and which rows are kept."""

import pytest

from nudging import Nudging
from nudging.core.need import Draft, Need
from nudging.core.policy_view import RequestView
from nudging.core.request import Request
from nudging.core.speculation.drafters import GuideDrafter, look_up
from nudging.core.speculation.drafting import _length, settle_draft
from nudging.core.speculation.ledger import Account, Drafting, Ledger, draft_length, drafting_cost
from nudging.executor.sampler import TorchSampler
from tests.core.test_scheduler import MODELS, request, small_engine
from tests.support.fake import FixedCosts, fake_engine
from tests.support.simulated import Setup, SimLLM

LEDGER = {"base": FixedCosts(1.0, 0.25), "guide": FixedCosts(0.25, 0.125)}


def with_draft(draft: list[int], output: list[int], start: int = 0) -> Request:
    """A request that drafted at `start` of its output and has written `output` since."""
    engine, roles = small_engine(20)
    job = request(roles, "r", 3, 20, Nudging(0.4, "token"), 4)
    job.output = [9] * start + output
    job.draft = Draft(start, len(draft), draft)
    return job


@pytest.mark.parametrize(
    ("draft", "output", "accepted", "learned"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3, (3, 3)),
        ([1, 2, 3], [1, 2, 9, 3], 2, (3, 2)),
        ([1, 2, 3], [9], 0, (1, 0)),
        # What the end of the text cut off was not refused.
        ([1, 2, 3], [1, 2], 2, (2, 2)),
    ],
)
def test_a_draft_is_settled_by_what_became_text(
    draft: list[int],
    output: list[int],
    accepted: int,
    learned: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(Ledger, "learn", lambda ledger, *counts: told.append(counts))
    job = with_draft(draft, output, start=2)
    for _ in range(2):
        settle_draft(job, Ledger(LEDGER))
    assert (job.counters.accepted, job.counters.cycles, told) == (accepted, {accepted: 1}, [learned])


def test_every_draft_of_a_text_is_counted() -> None:
    engine, roles = small_engine(200)
    job = request(roles, "r", 3, 60, Nudging(0.4, "token"), 4)
    engine.add(job)
    cycles = 0
    while engine.has_work:
        before = job.draft
        engine.step()
        cycles += before is not None and (job.draft is None or job.draft.start != before.start)
    assert sum(job.counters.cycles.values()) == cycles > 10
    assert sum(n * times for n, times in job.counters.cycles.items()) == job.counters.accepted
    assert 0 < job.counters.accepted < job.counters.drafted


def test_rows_of_what_is_written_are_dropped() -> None:
    engine, roles = small_engine(200)
    job = request(roles, "r", 3, 80, Nudging(0.4, "token"), 4)
    engine.add(job)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, *(len(sequence.rows) for sequence in job.sequences.values()))
    assert most <= 5


def test_a_given_text_is_read_in_one_pass_of_each_role() -> None:
    llm = SimLLM(Setup(), threaded=True)
    with llm, llm.open([2, 3, 4], Nudging(0.4, "token")) as text:
        before = [runner.passes for runner in llm.runners]
        assert len(text.score([5, 6, 7, 8, 9, 10, 11, 12])) == 8
        assert [runner.passes - n for runner, n in zip(llm.runners, before, strict=True)] == [1, 1]


def test_a_lagging_guide_reads_the_text_before_it_drafts() -> None:
    engine, roles = small_engine(200)
    job = request(roles, "r", 3, 20, Nudging(0.4, "token"), None)
    engine.add(job)
    job.output = [5] * 10
    job.sequences["guide"].num_computed = 5
    view = RequestView(job, Ledger(LEDGER), TorchSampler())
    ledger, guide = Ledger(LEDGER), LEDGER["guide"]
    drafting = GuideDrafter().drafting(view)
    assert drafting == Drafting("guide", 0, 8)
    assert drafting_cost(ledger, drafting, 1) == guide.of(8, 1)
    assert drafting_cost(ledger, drafting, 3) == guide.of(8, 1) + 2 * guide.of(1, 1)
    job.sequences["guide"].num_computed = 13
    assert GuideDrafter().drafting(view) == Drafting("guide", 0, 1), "at least one row"


@pytest.mark.parametrize("max_tokens", [1, 20])
def test_a_draft_and_the_pass_that_reads_it_are_owed(max_tokens: int) -> None:
    engine, roles = small_engine(200)
    job = request(roles, "r", 3, max_tokens, Nudging(0.4, "token"), None)
    engine.add(job)
    ledger = Ledger(LEDGER, Account(lazy=1000.0), lazy=1000.0)
    view, need = RequestView(job, ledger, TorchSampler()), Need("base", 3, 3)
    length = _length(job, view, ledger, GuideDrafter(), need)
    assert (length > 0) == (max_tokens > 1)
    drafted = drafting_cost(ledger, GuideDrafter().drafting(view), length)
    assert ledger.account.owed == drafted + LEDGER["base"].of(3 + length, 1 + length)


def test_without_a_draft_the_rows_that_are_left_to_read_are_owed() -> None:
    engine, roles = fake_engine(MODELS, LEDGER)
    job = request(roles, "r", 6, 20)
    engine.add(job)
    engine.step()
    assert engine._ledgers[job.id].account.owed == LEDGER["base"].of(1, 1)


def test_what_can_be_wasted_to_the_last_is_drafted() -> None:
    """A looked-up draft, read at the price of one row, costs the loan and no more."""
    ledger = Ledger({"base": FixedCosts(1.0)}, Account(lazy=100.0))
    assert ledger.budget == 1.0
    assert draft_length(ledger, "base", 1, Drafting("", 8), 8) == 8


def test_a_text_is_looked_up_from_its_first_token_on() -> None:
    assert look_up([7, 8, 9, 7, 8], 1) == [9]
    # Bytes that agree from the second one on are no token.
    assert look_up([256, 256, 512, 1, 1], 1) == []
    assert look_up([1, 1, 9, 256, 256, 512, 1, 1], 1) == [9]
