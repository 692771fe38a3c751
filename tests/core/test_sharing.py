"""One plan at a time: who gets how many tokens, what siblings share, and what a preempted text keeps."""

import pytest

from nudging import Base, Guide, Nudging, SamplingParams
from nudging.core.need import Need
from nudging.core.scheduler import DECODE_TOKENS
from tests.core.test_cosched import models
from tests.core.test_prefix_cache import PROMPT_IDS, siblings
from tests.core.test_scheduler import COSTS, finish, request, small_engine
from tests.support.fake import FixedCosts, fake_engine
from tests.support.simulated import Setup
from tests.support.simulation import World


@pytest.mark.parametrize(("length", "computed"), [(DECODE_TOKENS, [12, 4]), (DECODE_TOKENS + 1, [16, 0])])
def test_a_short_need_leaves_long_ones_their_share(length: int, computed: list[int]) -> None:
    engine, roles = small_engine(200, max_batch_tokens=16)
    jobs = [request(roles, "first", length, 1), request(roles, "long", 60, 1)]
    for job in jobs:
        engine.add(job)
    engine.step()
    assert [job.sequences["base"].num_computed for job in jobs] == computed


def test_who_waits_for_its_prompt_lengthens_nobodys_path() -> None:
    """The guide reads a prompt in parts: it is no path, and one token of the draft is worth waiting for."""
    costs = {"base": FixedCosts(1.0), "guide": FixedCosts(0.5)}
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), costs, max_batch_tokens=16)
    draft = request(roles, "d", 3, 30, Nudging(0.4, "token"), 8)
    engine.add(draft)
    engine.add(request(roles, "g", 60, 5, Guide()))
    engine.step()
    assert draft.counters.passes == {"guide": 1}


def test_a_sibling_that_has_its_prompt_waits_for_nobody() -> None:
    """Not even for one above it that lost its cache and reads the prompt again."""
    engine, roles = small_engine(200)
    jobs = siblings(roles, 2, 4)
    for job in jobs:
        engine.add(job)
    engine.step()
    assert engine.scheduler._find_computed(jobs[1])
    assert jobs[1].sequences["base"].num_computed == 57
    jobs[0].sequences["base"].release()
    assert engine.scheduler._find_computed(jobs[1])


def test_a_sibling_shares_no_more_than_what_comes_before_its_row() -> None:
    engine, roles = small_engine(200)
    jobs = siblings(roles, 2, 4)
    for job in jobs:
        engine.add(job)
    engine.step()
    jobs[1].need = Need("base", 20, 20)
    engine.scheduler._take_prompt(jobs[1], "base", jobs[0])
    assert jobs[1].sequences["base"].num_computed == 19


def test_what_a_draft_wrote_is_found_after_a_preemption() -> None:
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), COSTS)
    job = request(roles, "r", [1, 2, 3], 30, Nudging(0.4, "token"), 8)
    job.params = SamplingParams(max_tokens=30)
    engine.add(job)
    engine.step()
    assert [sequence.num_computed for sequence in job.sequences.values()] == [11, 10]
    engine.scheduler._preempt(job)
    finish(engine)
    assert (len(job.output), job.error, job.counters.preemptions) == (30, None, 1)
    assert job.counters.recomputed == 3 + 2, "two blocks of four tokens each are there still"


def test_a_plan_is_of_one_model() -> None:
    engine, roles = small_engine(200)
    jobs = [request(roles, "b", 5, 3, Base()), request(roles, "g", 5, 3, Guide())]
    for job in jobs:
        engine.add(job)
    engine.step()
    for model, job in zip(("base", "guide"), jobs, strict=True):
        job.bring_back()
        assert [work.request for work in engine.scheduler.schedule(model).works] == [job]


def test_siblings_of_one_that_runs_claim_nothing_of_their_prompt() -> None:
    engine, roles = small_engine(50)
    jobs = siblings(roles, 8, 8)
    for job in jobs:
        engine.add(job)
    engine.step()
    assert len(engine.scheduler.running) == 8, "before anything of it was read"


def test_who_reads_a_prompt_alone_claims_it() -> None:
    engine, roles = small_engine(50)
    first, _ = siblings(roles, 2, 8)
    engine.scheduler.add(first)
    assert engine.scheduler.admit() == [first]
    assert engine.scheduler.claims.of(first) == {"base": 16, "guide": 0}


def test_of_what_others_hold_a_request_claims_the_block_of_its_row() -> None:
    engine, roles = small_engine(50)
    engine.add(request(roles, "first", PROMPT_IDS, 20))
    engine.step()
    other = request(roles, "other", PROMPT_IDS, 20)
    engine.scheduler.add(other)
    # 60 tokens and a block to grow are 16; the last token of the prompt is read in any case.
    assert engine.scheduler.claims.of(other) == {"base": 16 - 14, "guide": 0}


def test_an_open_text_that_goes_on_takes_the_memory_of_a_later_idle_one() -> None:
    world = World(Setup(block_size=1, blocks=(34, 34)))
    texts = [world.open([2, token], Nudging(0.4, "token")) for token in (3, 4)]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    for text in (*texts, texts[0]):
        job = world.extend(text, params)
        for _ in range(60):
            world.turn()
        assert job.handle.is_finished
    world.drain()
