"""Admission costs what it admits: counted, not timed."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from nudging import Base, SamplingParams
from nudging.core.claims import Claims
from nudging.core.engine import Engine
from nudging.core.ranked import Ranked
from nudging.core.request import Request
from nudging.core.sequence import Sequence
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from tests.core.test_scheduler import mix, small_engine
from tests.support.fake import FixedCosts, fake_engine
from tests.support.tiny import HashModel

Counts = Counter[str]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often a claim was computed, and how many ranks were compared."""
    counted: Counts = Counter()

    def count(owner: type, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            counted[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    count(Claims, "of")
    count(Sequence, "count_known")
    return counted


def engine_of(num_blocks: int) -> tuple[Engine, dict[str, Role]]:
    return fake_engine({"base": HashModel(1)}, {"base": FixedCosts(1.0)}, num_blocks)


def add(engine: Engine, roles: dict[str, Role], count: int, **options: float) -> list[Request]:
    """Requests of 8 tokens that write 2 to 9."""
    rng = random.Random(3)
    jobs = []
    for i in range(count):
        prompts = {"base": RolePrompt(rng.choices(range(2, 32), k=8))}
        params = SamplingParams(max_tokens=rng.randrange(2, 10), ignore_eos=True)
        jobs.append(Request(f"r{i}", Base(), params, i, prompts, roles, **options))
        engine.add(jobs[-1])
    return jobs


@pytest.mark.parametrize("number", [100, 1000, 3000])
def test_who_is_admitted_at_once_is_looked_at_once(counts: Counts, number: int) -> None:
    engine, roles = engine_of(num_blocks=8 * number)
    add(engine, roles, number)
    assert len(engine.scheduler.admit()) == number
    assert counts == {"of": number, "count_known": number}


@pytest.mark.parametrize("number", [100, 1000, 3000])
def test_who_comes_in_as_others_end_is_looked_at_a_few_times(counts: Counts, number: int) -> None:
    """Some fifty run: those who are carried are asked together, so they cost those who wait nothing."""
    engine, roles = engine_of(num_blocks=180)
    jobs = add(engine, roles, number)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert 25 < most < 80
    assert all(job.finish_reason == "length" for job in jobs)
    assert counts["of"] < 8 * number, counts


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_of_all_claims_is_what_each_one_claims(carries: bool, seed: int) -> None:
    """In every step of requests that begin, write, wait and end, some of them with a guide that never ran."""
    engine, roles = small_engine(60, carries=carries)
    for job in mix(roles, 30, seed):
        engine.add(job)
    claims, running = engine.scheduler.claims, engine.scheduler.running
    seen = []
    while engine.has_work:
        engine.step()
        claims.forget()
        carried = [job.is_carried for job in running]
        total = dict(claims.of_running())
        assert total == claims.of_all(running)
        assert carried == [job.is_carried for job in running], "to ask takes nobody back"
        empty = [job.num_blocks(role) == 0 for job in running if job.is_carried for role in job.policy.roles]
        seen.append((any(carried), any(empty)))
    assert (carries, carries) in seen


def test_the_clock_is_asked_for_one_who_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many have a timeout: they stand in the order of their deadlines."""
    engine, roles = engine_of(num_blocks=100)
    jobs = add(engine, roles, 200, timeout=1e6)
    asked: list[Request] = []
    is_late = Request.is_late.fget
    assert is_late is not None
    monkeypatch.setattr(Request, "is_late", property(lambda self: asked.append(self) or is_late(self)))
    engine.step()
    assert asked == jobs[:1]
    for job in jobs:
        engine.abort(job)
    assert not engine.scheduler._timed


def test_ranks_order_requests_however_they_come() -> None:
    _, roles = engine_of(10)
    rng, ranked = random.Random(1), Ranked()
    jobs = []
    for i in range(200):
        job = Request(f"r{i}", Base(), SamplingParams(), 0, {"base": RolePrompt([2])}, roles)
        job.rank = (rng.randrange(3), i)
        jobs.append(job)
        ranked.add(job)
    assert ranked == sorted(jobs, key=lambda job: job.rank)
    gone = rng.sample(jobs, 100)
    for job in gone:
        ranked.remove(job)
    for job in jobs:
        assert (job in ranked) == (job not in gone)
        assert ranked.num_above(job) == sum(other.rank < job.rank for other in ranked)
    assert "r0" not in ranked
