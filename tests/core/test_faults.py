"""One fault at every place where it can happen: it ends the request concerned and touches no other."""

import itertools
from collections.abc import Callable

import pytest

from nudging import BadRequest, Base, Nudging, SamplingParams
from nudging.errors import NumericalError, OutOfBlocks
from tests.support.simulated import Setup
from tests.support.simulation import Job, World

# Not all fit at once, and blocks are small: requests wait, and allocate all the time.
SETUP = Setup(block_size=2, blocks=(46, 46), max_batch_tokens=8)
PROMPT = [2, 3, 4, 5, 6, 7, 8]


def three_requests(world: World) -> list[Job]:
    """Drafting and not, greedy and sampled, by token and by word; all end within some ten turns."""
    sampled = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=3)
    return [
        world.submit(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True), Nudging(0.4, "token"), 3),
        world.submit(PROMPT[3:], sampled, Nudging(0.4, "word"), "off"),
        world.submit(PROMPT[::-1], sampled, Base(), "off"),
    ]


def everything(world: World) -> list[Job]:
    """Requests beside an open text that is forked, rewound and goes on: every reason to allocate."""
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    generation = world.open(PROMPT, Nudging(0.4, "token"))
    jobs = [*three_requests(world), world.extend(generation, params)]
    finish(world)
    fork = world.fork(generation)
    generation.rewind(len(generation.token_ids) // 2)
    jobs += [world.extend(generation, params), world.extend(fork, params), *three_requests(world)]
    finish(world)
    # Whatever became of it before, it goes on.
    jobs += [world.extend(generation, params), world.extend(fork, params)]
    return jobs


def finish(world: World) -> None:
    while world.jobs:
        world.turn()


def run(fault: Callable[[World], None], error: type[Exception] | None = None) -> tuple[World, int]:
    """`everything` in a world with a fault; how many requests ended with `error`, the others as they must.

    Those are compared with the straight-line twins, every turn, by the world itself.
    """
    world = World(SETUP)
    world.excused = error
    fault(world)
    everything(world)
    world.drain()
    return world, world.finished["error"]


def test_an_allocation_that_fails_ends_one_request_at_most() -> None:
    """None where the block was for something done ahead: that is done later."""
    clean, _ = run(lambda world: None)
    ended = 0
    for index, runner in enumerate(clean.llm.runners):
        assert runner.pool.allocations > 20
        for n in range(1, runner.pool.allocations + 2):

            def fail(world: World, index: int = index, n: int = n) -> None:
                world.llm.runners[index].pool.fails_at = n

            world, failed = run(fail, OutOfBlocks)
            met = world.llm.runners[index].pool.allocations >= n
            assert failed <= met, f"allocation {n} of pool {index}: {failed} requests failed"
            ended += failed
    assert ended > 20


def test_a_row_of_nan_ends_the_request_that_reads_it() -> None:
    clean, _ = run(lambda world: None)
    for index, runner in enumerate(clean.llm.runners):
        ended = 0
        for row in range(runner.rows_made):

            def spoil(world: World, index: int = index, row: int = row) -> None:
                world.llm.runners[index].nan_rows.add(row)

            _, failed = run(spoil, NumericalError)
            assert failed <= 1
            ended += failed
        assert ended > runner.rows_made / 2, "most rows are read, those behind refused drafts are not"


def turns_of(schedule: Callable[[World], object]) -> int:
    world = World(SETUP)
    schedule(world)
    world.drain()
    return world.turns


def cancel_at(turns: tuple[int, ...], last: int) -> None:
    """Cancel each of the three requests at its turn; beyond the last one means never."""
    world = World(SETUP)
    jobs = three_requests(world)
    for turn in range(last + 1):
        for job, at in zip(jobs, turns, strict=True):
            if at == turn:
                world.cancel(job)
        world.turn()
    world.drain()


def test_any_two_of_three_requests_are_cancelled_at_any_turns() -> None:
    last = turns_of(three_requests)
    assert 5 <= last <= 14
    for never in range(3):
        for turns in itertools.product(range(last + 2), repeat=2):
            cancel_at((*turns[:never], last + 1, *turns[never:]), last)


@pytest.mark.slow
def test_all_three_requests_are_cancelled_at_any_turns() -> None:
    """One server for each of 729 triples, 5,832 turns in all."""
    last = turns_of(three_requests)
    for turns in itertools.product(range(last + 2), repeat=3):
        cancel_at(turns, last)


def test_cancelling_frees_the_memory_in_the_same_turn() -> None:
    for turn in range(turns_of(three_requests)):
        world = World(SETUP)
        jobs = three_requests(world)
        for _ in range(turn):
            world.turn()
        for job in jobs:
            world.cancel(job)
        world.turn()
        assert not world.jobs
        assert not world.engine.has_work
        world.drain()


def test_closing_at_every_turn_ends_everything_once() -> None:
    for turn in range(turns_of(everything)):
        world = World(SETUP)
        jobs = three_requests(world)
        generation = world.open(PROMPT, Base())
        jobs.append(world.extend(generation, SamplingParams(max_tokens=5)))
        for _ in range(turn):
            world.turn()
        world.close_server()
        assert all(job.handle.is_finished for job in jobs)


@pytest.mark.parametrize("tokens", [3, 40])
def test_what_can_never_fit_is_refused_and_the_others_go_on(tokens: int) -> None:
    world = World(SETUP)
    jobs = three_requests(world)
    generation = world.open([2] * 80, Base())
    refused = world.extend(generation, SamplingParams(max_tokens=tokens + 10))
    with pytest.raises(BadRequest, match=r"the request may need \d+ tokens of cache in model 'base'"):
        world.submit([2] * 60, SamplingParams(max_tokens=tokens), Nudging(), 15)
    assert refused.may_fail
    world.drain()
    assert all(job.requests[0].error is None for job in jobs)
    assert isinstance(refused.requests[0].error, BadRequest)
