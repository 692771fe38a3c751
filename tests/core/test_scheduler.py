"""Many requests on little memory: preempted ones take up the same path, nobody is lost or stands still."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from nudging import BadRequest, Base, DeadlineExceeded, Guide, Nudging, SamplingParams
from nudging.core.engine import Engine
from nudging.core.request import Request
from nudging.policies import Policy
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from tests.support.fake import FixedCosts, fake_engine
from tests.support.tiny import HashModel

BASE = HashModel(1, confident=0.6)
MODELS = {"base": BASE, "guide": HashModel(2, agrees_with=BASE, agreement=0.7)}
COSTS = {"base": FixedCosts(1.0), "guide": FixedCosts(0.1)}
POLICIES = [Base(), Nudging(0.4, "token"), Nudging(1.5, "token"), Nudging(0.0, "token")]


def small_engine(
    num_blocks: int, max_batch_tokens: int = 2048, **options: bool
) -> tuple[Engine, dict[str, Role]]:
    return fake_engine(MODELS, COSTS, num_blocks, max_batch_tokens=max_batch_tokens, **options)


def request(
    roles: dict[str, Role],
    name: str,
    prompt: int | list[int],
    max_tokens: int,
    policy: Policy | None = None,
    draft_len: int | None = 0,
    **options: Any,
) -> Request:
    """A request for a given prompt, or one of so many tokens."""
    ids = prompt if isinstance(prompt, list) else random.Random(name).choices(range(2, 32), k=prompt)
    prompts = {role: RolePrompt(list(ids)) for role in roles}
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=0)
    return Request(name, policy or Base(), params, len(name), prompts, roles, draft_len, **options)


def mix(roles: dict[str, Role], count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        request(
            roles,
            f"{seed}-{i}",
            rng.randrange(1, 30),
            rng.randrange(1, 90),
            rng.choice(POLICIES),
            rng.choice([0, None, 3]),
            priority=rng.choice([0, 0, 0, -1, 2]),
        )
        for i in range(count)
    ]


def finish(engine: Engine, each_step: Callable[[], None] = lambda: None, limit: int = 5000) -> int:
    """Step until nothing is left; returns the number of steps."""
    for steps in range(limit):
        if not engine.has_work:
            return steps
        engine.step()
        engine.check()
        for runner in engine.runners.values():
            runner.pool.check()
        each_step()
    raise AssertionError(f"still at work after {limit} steps")


def alone(make: Callable[[dict[str, Role]], Request]) -> list[int]:
    """What the request writes with all memory to itself."""
    engine, roles = small_engine(200)
    job = make(roles)
    engine.add(job)
    finish(engine)
    return job.output


def assert_all_free(engine: Engine) -> None:
    for runner in engine.runners.values():
        runner.pool.check()
        assert runner.pool.num_available == runner.pool.total


@pytest.mark.parametrize("seed", range(4))
def test_little_memory_changes_no_token(seed: int) -> None:
    engine, roles = small_engine(36, max_batch_tokens=(8, 50, 2048)[seed % 3])
    jobs = mix(roles, 12, seed)
    for job in jobs:
        engine.check_fits(job)
        engine.add(job)
    finish(engine)
    assert sum(job.counters.preemptions for job in jobs) > 0, "the pool was to be too small"
    for i, job in enumerate(jobs):
        assert job.error is None
        assert job.output == alone(lambda roles, i=i: mix(roles, 12, seed)[i]), job.id
    assert_all_free(engine)


def test_many_run_at_once_where_the_worst_case_would_not_fit() -> None:
    engine, roles = small_engine(40)
    for i in range(8):
        engine.add(request(roles, f"r{i}", 8, 100))
    engine.step()
    assert len(engine.scheduler.running) == 8, "8 x 108 tokens at worst, 160 fit"


def test_the_highest_ranked_is_never_preempted_and_the_lowest_always_first() -> None:
    engine, roles = small_engine(20)
    jobs = [request(roles, f"r{i}", 9, 60) for i in range(6)]
    for job in jobs:
        engine.add(job)

    def check() -> None:
        running, waiting = engine.scheduler.running, engine.scheduler.waiting
        assert [r.rank for r in running] == sorted(r.rank for r in running)
        assert [r.rank for r in waiting] == sorted(r.rank for r in waiting)
        assert max((r.rank for r in running), default=(0, 0)) < min((r.rank for r in waiting), default=(9, 0))

    finish(engine, check)
    preemptions = [job.counters.preemptions for job in jobs]
    assert preemptions[0] == 0 < sum(preemptions)
    ends = [job.counters.finished_at for job in jobs]
    assert ends == sorted(ends), "first come, first served"


def test_two_do_not_throw_each_other_out_in_turn() -> None:
    """What is computed again is bounded: once for the younger one, whose cache has to wait for the older."""
    engine, roles = small_engine(20)
    jobs = [request(roles, name, 8, 64) for name in ("older", "younger")]
    for job in jobs:
        engine.add(job)
    finish(engine)
    assert [job.counters.preemptions for job in jobs] == [0, 1]
    assert jobs[0].counters.recomputed == 0
    assert 0 < jobs[1].counters.recomputed <= 72


@pytest.mark.parametrize("seed", range(4))
def test_what_is_computed_again_is_bounded(seed: int) -> None:
    """A request comes back only when something ended, so it loses its cache at most once for each end."""
    engine, roles = small_engine(48)
    jobs = [request(roles, f"{seed} {i}", 10, 50, POLICIES[i % 4]) for i in range(24)]
    for job in jobs:
        engine.add(job)
    finish(engine)
    computed = sum(len(job.prompts["base"].ids) + len(job.output) for job in jobs for _ in job.policy.roles)
    again = sum(job.counters.recomputed for job in jobs)
    assert 0 < again < computed, f"{again} tokens of {computed} were computed again"
    assert max(job.counters.preemptions for job in jobs) <= 6


def test_a_more_urgent_request_takes_the_memory_of_others() -> None:
    engine, roles = small_engine(20)
    low = [request(roles, f"low{i}", 16, 40, priority=1) for i in range(2)]
    for job in low:
        engine.add(job)
    for _ in range(4):
        engine.step()
    assert engine.scheduler.running == low
    urgent = request(roles, "urgent", 40, 8)
    engine.add(urgent)
    engine.step()
    assert engine.scheduler.running[0] is urgent
    assert [job.counters.preemptions for job in low] == [0, 1], "no more are preempted than it takes"
    finish(engine)
    assert urgent.counters.finished_at < min(job.counters.finished_at for job in low)
    assert low[1].output == alone(lambda roles: request(roles, "low1", 16, 40))


def test_one_that_nothing_can_make_room_for_preempts_nobody() -> None:
    engine, roles = small_engine(30)
    jobs = [request(roles, "a", 50, 20), request(roles, "c", 6, 30, priority=1)]
    for job in jobs:
        engine.add(job)
    engine.step()
    assert engine.scheduler.running == jobs
    engine.add(request(roles, "b", 70, 20))
    finish(engine)
    assert [job.counters.preemptions for job in jobs] == [0, 0]


def test_what_fits_alone_is_accepted_and_finishes() -> None:
    engine, roles = small_engine(20)
    jobs = [request(roles, f"r{i}", 70, 10) for i in range(3)]
    for job in jobs:
        engine.check_fits(job)
        engine.add(job)
    with pytest.raises(BadRequest, match="may need 84 tokens of cache in model 'base', which has 80"):
        engine.check_fits(request(roles, "long", 71, 10))
    finish(engine)
    assert [len(job.output) for job in jobs] == [10] * 3
    assert_all_free(engine)


def test_totals_never_fall_while_a_request_waits_for_its_memory() -> None:
    engine, roles = small_engine(20)
    jobs = [request(roles, f"r{i}", 9, 60) for i in range(3)]
    for job in jobs:
        engine.add(job)
    seen = [0]

    def look() -> None:
        seen.append(engine.stats().totals.generated_tokens)

    finish(engine, look)
    assert seen == sorted(seen)
    totals = engine.stats().totals
    assert (totals.generated_tokens, totals.preemptions > 0) == (180, True)


def test_a_preempted_request_can_be_aborted() -> None:
    engine, roles = small_engine(20)
    jobs = [request(roles, f"r{i}", 9, 60) for i in range(3)]
    for job in jobs:
        engine.add(job)
    while not jobs[2].counters.preemptions:
        engine.step()
    engine.abort(jobs[2])
    written = len(jobs[2].output)
    assert (jobs[2].finish_reason, written > 0) == ("abort", True)
    finish(engine)
    assert len(jobs[2].output) == written
    assert_all_free(engine)


def test_a_failed_allocation_ends_one_request_wherever_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th allocation fails, for every n: that request ends with the error, the others as ever."""
    from nudging.core.block_pool import BlockPool
    from nudging.errors import OutOfBlocks

    allocate = BlockPool.allocate
    whole = [alone(lambda roles, i=i: request(roles, f"r{i}", 9, 12)) for i in range(3)]
    for n in range(1, 40):
        engine, roles = small_engine(40)
        jobs = [request(roles, f"r{i}", 9, 12) for i in range(3)]
        for job in jobs:
            engine.add(job)
        calls = 0

        def fail_once(pool: BlockPool, n: int = n) -> int:
            nonlocal calls
            calls += 1
            if calls == n:
                raise OutOfBlocks("injected")
            return allocate(pool)

        monkeypatch.setattr(BlockPool, "allocate", fail_once)
        moved: list[Request] = []
        while engine.has_work:
            moved += engine.step()
        monkeypatch.setattr(BlockPool, "allocate", allocate)
        failed = [job for job in jobs if job.error is not None]
        assert len(failed) == (calls >= n)
        assert set(jobs) <= set(moved), "every one that ended was told"
        assert all(job.output == whole[i] for i, job in enumerate(jobs) if job.error is None)
        assert_all_free(engine)
        if calls < n:
            return
    raise AssertionError("the injection never passed the end")


def test_who_needs_another_model_holds_nobody_up() -> None:
    engine, roles = small_engine(200, max_batch_tokens=16)
    first = request(roles, "g", 5, 20, Guide())
    second = request(roles, "b", 5, 20)
    for job in (first, second):
        engine.add(job)
    for written in range(1, 6):
        engine.step()
        assert [len(first.output), len(second.output)] == [written] * 2


def test_only_who_holds_blocks_of_the_short_pool_gives_way() -> None:
    engine, roles = small_engine(20)
    writing = [request(roles, f"r{i}", 9, 60) for i in range(2)]
    guided = request(roles, "guided", 5, 40, Guide())
    for job in (*writing, guided):
        engine.add(job)
    finish(engine)
    assert [job.counters.preemptions for job in (*writing, guided)] == [0, 1, 0]


def test_a_request_claims_what_it_will_hold_soon() -> None:
    """Prompt, what is written ahead of it, and a block to grow; never more than it may ever hold."""
    engine, roles = small_engine(200)
    nudged = request(roles, "n", 5, 90, Nudging(0.4, "token"), 8)
    short = request(roles, "s", 5, 1)
    for job in (nudged, short):
        engine.scheduler.add(job)
    ahead = 8 + nudged.policy.lookahead
    assert engine.scheduler.claims.of(nudged) == dict.fromkeys(("base", "guide"), -(-(5 + ahead + 4) // 4))
    assert engine.scheduler.claims.of(short) == {"base": 2, "guide": 0}


def test_a_budget_of_one_token_goes_to_the_higher_ranked() -> None:
    engine, roles = small_engine(200, max_batch_tokens=1)
    writer = request(roles, "w", 3, 50)
    engine.add(writer)
    for _ in range(3):
        engine.step()
    engine.add(request(roles, "long", 60, 1))
    for written in range(2, 12):
        engine.step()
        assert len(writer.output) == written


def test_a_finished_request_cannot_be_aborted() -> None:
    engine, roles = small_engine(20)
    job = request(roles, "r", 5, 4)
    engine.add(job)
    finish(engine)
    engine.abort(job)
    assert job.finish_reason == "length"
    assert len(job.output) == 4


def running_request(roles: dict[str, Role], engine: Engine, name: str, **options: Any) -> Request:
    job = request(roles, name, 3, 400, **options)
    engine.add(job)
    return job


@pytest.mark.parametrize("budget", [2, 8, 40])
def test_a_long_prompt_is_read_within_the_stated_bound_however_many_write(budget: int) -> None:
    engine, roles = small_engine(2000, max_batch_tokens=budget)
    writing = [running_request(roles, engine, f"r{i}") for i in range(2 * budget)]
    for _ in range(10):
        engine.step()
    first, second = request(roles, "first", 120, 1), request(roles, "second", 150, 1)
    engine.add(first)
    engine.add(second)
    share = max(budget // 4, 1)
    for job, bound in ((first, 120), (second, 270)):
        steps = 0
        while not job.is_finished:
            engine.step()
            steps += 1
        assert steps <= -(-bound // share), "ceil((P + Q) / share)"
    assert any(len(job.output) > 20 for job in writing), "and the others went on writing"


def test_texts_are_written_while_a_long_prompt_is_read() -> None:
    engine, roles = small_engine(2000, max_batch_tokens=40)
    engine.add(request(roles, "long", 400, 5))
    writing = [running_request(roles, engine, f"r{i}") for i in range(20)]
    engine.step()
    engine.step()
    before = [len(job.output) for job in writing]
    for _ in range(5):
        engine.step()
    assert [len(job.output) - n for job, n in zip(writing, before, strict=True)] == [5] * 20


def test_a_budget_of_one_token_serves_everybody() -> None:
    engine, roles = small_engine(200, max_batch_tokens=1)
    jobs = [request(roles, f"r{i}", (3, 50)[i % 2], 5) for i in range(6)]
    for job in jobs:
        engine.add(job)
    finish(engine)
    assert [len(job.output) for job in jobs] == [5] * 6


def test_a_lower_priority_number_runs_earlier() -> None:
    engine, roles = small_engine(26)
    jobs = [request(roles, f"r{p}", 10, 50, priority=p) for p in (3, 1, 2, 0)]
    for job in jobs:
        engine.add(job)
    finish(engine)
    ended = sorted(jobs, key=lambda job: job.counters.finished_at)
    assert [job.priority for job in ended] == [0, 1, 2, 3]


def test_who_is_late_ends_at_once_running_preempted_or_waiting() -> None:
    now = 0.0
    engine, roles = small_engine(20)
    jobs = [
        request(roles, name, 9, 60, timeout=timeout, clock=lambda: now)
        for name, timeout in (("patient", None), ("runs", 5.0), ("was preempted", 5.0), ("waits", 5.0))
    ]
    for job in jobs[:3]:
        engine.add(job)
    while not any(job.counters.preemptions for job in jobs):
        engine.step()
    engine.add(jobs[3])
    engine.step()
    states = [job in engine.scheduler.running for job in jobs]
    assert states == [True, True, False, False]
    now = 4.9
    engine.step()
    assert not any(job.is_finished for job in jobs)
    now = 5.0
    moved = engine.step()
    assert [job.finish_reason for job in jobs] == [None, "abort", "abort", "abort"]
    assert set(jobs) == set(moved), "everybody is told"
    for job in jobs[1:]:
        assert isinstance(job.error, DeadlineExceeded)
        assert f"{len(job.output)} of 60 tokens were written within the timeout of 5.0 s" in str(job.error)
    held = {block for sequence in jobs[0].sequences.values() for block in sequence.block_table.ids}
    assert sum(r.pool.total - r.pool.num_available for r in engine.runners.values()) == len(held)
    finish(engine)
    assert (len(jobs[0].output), jobs[0].error) == (60, None)
    assert_all_free(engine)
