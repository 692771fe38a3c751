"""One engine step by step: what it tells, what it learns from its passes, what it keeps of what ended."""

import io
import json

import pytest

from nudging import BadRequest, Base, Nudging, SamplingParams
from nudging.core.engine import Engine
from nudging.core.request import Request
from nudging.core.trace import Trace
from nudging.errors import NumericalError
from nudging.policies import Step, View
from tests.core.test_cosched import models
from tests.core.test_prefix_cache import PROMPT_IDS
from tests.core.test_scheduler import COSTS, MODELS, finish, request, small_engine
from tests.support.fake import FixedCosts, fake_engine
from tests.support.simulated import Setup, SimLLM
from tests.support.simulation import Broken, World


def started(engine: Engine, job: Request) -> Request:
    engine.add(job)
    engine.step()
    return job


@pytest.mark.parametrize("carries", [False, True])
def test_a_step_tells_who_moved_until_the_end(carries: bool) -> None:
    engine, roles = small_engine(40, carries=carries)
    jobs = [
        request(roles, name, 5, 6, policy) for name, policy in (("a", Base()), ("b", Nudging(2, "token")))
    ]
    for job in jobs:
        engine.add(job)
    while engine.has_work:
        running = [job for job in jobs if not job.is_finished]
        moved = engine.step()
        assert sorted(job.id for job in moved) == [job.id for job in running]


def test_what_a_step_without_a_draft_will_cost_is_planned() -> None:
    """A row and an answer, whatever stands before it."""
    costs = {"base": FixedCosts(1.0, 0.1, 0.01), "guide": FixedCosts(0.5)}
    engine, roles = fake_engine(MODELS, costs, 40, carries=False)
    started(engine, request(roles, "r", 9, 5, Base(), None))
    engine.step()
    assert engine._ledgers["r"]._owed == pytest.approx(1.11)


def test_a_step_that_leaves_nothing_to_do_asserts_that_no_block_is_lost() -> None:
    engine, roles = small_engine(20)
    started(engine, request(roles, "r", 5, 3))
    engine.runners["guide"].pool._free.pop()
    engine.step()
    with pytest.raises(AssertionError, match="19 free .* != 20 blocks"):
        engine.step()


def test_a_running_request_is_checked() -> None:
    engine, roles = small_engine(20)
    job = started(engine, request(roles, "r", 5, 3))
    job.output.append(7)
    job.sequences["base"].context_len += 1
    with pytest.raises(AssertionError, match="base does not hold the text"):
        engine.check()


def test_usage_is_the_share_of_blocks_that_are_held() -> None:
    engine, roles = small_engine(20)
    started(engine, request(roles, "r", 15, 9))
    assert engine.stats().kv_cache_usage == {"base": pytest.approx(4 / 20), "guide": 0.0}
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)


def test_a_pass_is_described_by_its_rows_and_who_reads_what() -> None:
    file = io.StringIO()
    engine, roles = small_engine(20)
    engine._tracer = Trace(file)
    for name, prompt in (("a", 6), ("b", 3)):
        engine.add(request(roles, name, prompt, 2))
    engine.step()
    engine.step()
    passes = [event for event in json.loads(file.getvalue() + "]") if event["name"] == "pass"]
    assert [event["args"] for event in passes] == [
        {"rows": 9, "a base": "0:6, 1 answers", "b base": "0:3, 1 answers"},
        {"rows": 2, "a base": "6:7, 1 answers", "b base": "3:4, 1 answers"},
    ]


def test_an_engine_learns_what_passes_cost_from_those_it_makes() -> None:
    """A simulated pass takes a second and a hundredth of one for each row."""
    llm = SimLLM(Setup())
    engine = llm._engine
    llm.submit([2] * 60, SamplingParams(max_tokens=5, ignore_eos=True), Base(), "off")
    llm._thread.turn()
    assert engine.costs["base"].of(60, 1) == pytest.approx(1.6)
    prior = engine.costs["guide"].of(1, 1)
    llm.submit([3] * 9, SamplingParams(max_tokens=5, ignore_eos=True), Base(), "off")
    llm._thread.turn()
    assert engine.costs["base"].of(10, 2) == pytest.approx(1.1), "both rows and requests of one pass"
    assert engine.costs["guide"].of(1, 1) == prior, "nothing is learned where no pass was made"


def test_rows_that_took_no_pass_are_not_timed() -> None:
    llm = SimLLM(Setup())
    llm.runners[0].passes_made = 0
    prior = llm._engine.costs["base"].of(1, 1)
    llm.submit([2], SamplingParams(max_tokens=5, ignore_eos=True), Base(), "off")
    llm._thread.turn()
    assert llm._engine.costs["base"].of(1, 1) == prior


def test_passes_are_shared_by_those_that_run() -> None:
    engine, roles = small_engine(200)
    first = started(engine, request(roles, "a", 5, 9))
    assert engine._ledgers[first.id].sharers("base") == 1
    for name in "bc":
        engine.add(request(roles, name, 5, 9))
    engine.step()
    assert engine._ledgers[first.id].sharers("base") == 3


def test_what_others_computed_costs_lazy_nothing() -> None:
    """What the second request finds behind its own beginning, the first one has read meanwhile."""
    cost = FixedCosts(1.0, 0.5)
    costs = {"base": cost, "guide": FixedCosts(0.1)}
    engine, roles = fake_engine(models(), costs, max_batch_tokens=64)
    first, second = (request(roles, name, PROMPT_IDS, 3) for name in "ab")
    engine.add(first)
    started(engine, second)
    assert second.sequences["base"].num_computed == 4
    engine.step()
    assert second.counters.cached == 52
    # The four rows of its prompt that a pass had room for, the four that were left to it then, and now the
    # one behind its first token: at half the price of passes of two.
    ledger = engine._ledgers[second.id]
    read = (2 * cost.of(8, 2) + cost.of(2, 2)) / 2
    assert ledger.lazy == ledger.account.lazy == pytest.approx(read)
    assert ledger.paid == pytest.approx(read - cost.of(2, 2) / 2), "the last one is still to be read"


def test_lazy_would_read_a_lost_cache_again() -> None:
    cost = FixedCosts(1.0, 0.5)
    engine, roles = fake_engine(models(), {"base": cost, "guide": FixedCosts(0.1)}, num_blocks=20)
    jobs = [request(roles, name, 8, 64) for name in ("older", "younger")]
    for job in jobs:
        engine.add(job)
    engine.step()
    older, younger = (engine._ledgers[job.id] for job in jobs)
    finish(engine)
    assert [job.counters.preemptions for job in jobs] == [0, 1]
    assert older.lazy == pytest.approx(older.paid)
    # The row it waited for when it lost its cache was asked for twice.
    assert younger.lazy == pytest.approx(younger.paid + cost.of(2, 2) / 2)


def test_the_last_draft_of_a_text_is_counted_and_its_text_is_found_again() -> None:
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), COSTS)
    job = request(roles, "a", [1, 2, 3], 9, Nudging(0.4, "token"), 8)
    job.params = SamplingParams(max_tokens=9)
    started(engine, job)
    assert (job.finish_reason, job.counters.accepted, job.counters.cycles) == ("length", 8, {8: 1})
    again = request(roles, "b", [1, 2, 3, *job.output[:8]], 1)
    engine.add(again)
    finish(engine)
    assert again.counters.cached == 8


def test_what_a_failed_request_computed_is_not_found_again() -> None:
    world = World(Setup(prefix_caching=True))
    world.excused = NumericalError
    world.llm.runners[0].nan_rows.add(0)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    failed = world.submit([2] * 9, params, Base(), "off")
    world.drain()
    assert isinstance(failed.requests[0].error, NumericalError)
    assert world.llm.runners[0].pool.num_cached == 0
    whole = world.submit([2] * 9, params, Base(), "off")
    world.drain()
    assert whole.requests[0].counters.cached == 0


class InThrees(Broken):
    """Writes three tokens a step, as the base's own, and then ends the text."""

    def step(self, view: View, state: int) -> Step:
        token = view.row("base").token
        return Step((token, token + 1, token), "base", state=state + 1, finish="stop")


@pytest.mark.parametrize(("max_tokens", "finish_reason"), [(2, "length"), (3, "length"), (4, "stop")])
def test_a_step_of_many_tokens_is_cut_where_the_text_ends(max_tokens: int, finish_reason: str) -> None:
    engine, roles = small_engine(20)
    job = request(roles, "r", 5, max_tokens, InThrees("", 0))
    job.params = SamplingParams(max_tokens=max_tokens)
    started(engine, job)
    assert (len(job.output), job.finish_reason) == (min(max_tokens, 3), finish_reason)


def test_a_request_that_outgrows_what_was_reserved_for_it_ends_alone() -> None:
    engine, roles = small_engine(40)
    job, other = request(roles, "r", 5, 3), request(roles, "s", 5, 3)
    for one in (job, other):
        engine.add(one)
    engine.step()
    job.max_tokens = 30
    job.max_sequence = lambda role: 7  # type: ignore[method-assign]
    finish(engine)
    assert isinstance(job.error, BadRequest)
    assert "the text takes 8 tokens of 'base', 7 were reserved; raise max_tokens" in str(job.error)
    assert len(other.output) == 3
