"""Whole lives of a server, each from a seed; and that the simulation notices what it is there to notice."""

import random
from typing import Any

import pytest

from nudging import Base, Nudging, SamplingParams
from nudging.core.block_pool import BlockPool, BlockTable
from nudging.core.engine import Engine
from nudging.core.engine_loop import EngineLoop
from nudging.core.policy_view import RequestView
from nudging.core.prefix_cache import Prefix, PrefixCache
from nudging.core.request import Request
from nudging.core.scheduler import Scheduler
from nudging.core.sequence import Sequence
from nudging.errors import NumericalError
from tests.support.simulated import VOCAB, Setup
from tests.support.simulation import World, live

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def many_lives(first: int, turns: int, carries: bool = True) -> dict[str, int]:
    """Lives from seed `first` on, until they have had so many turns; how their requests ended."""
    ended: dict[str, int] = {}
    while turns > 0:
        world = live(first, carries=carries).world
        turns -= world.turns
        first += 1
        for reason, count in world.finished.items():
            ended[reason] = ended.get(reason, 0) + count
    return ended


def test_twenty_thousand_turns() -> None:
    ended = many_lives(0, 20_000)
    assert min(ended.values()) > 10, f"requests must end in every way: {ended}"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000_000, 9_000_000, 1_000_000))
def test_a_million_turns(first: int) -> None:
    """Eight times 125,000, two thirds of a minute each on a quiet core; the last one without C++."""
    many_lives(first, 125_000, carries=first != 8_000_000)


def test_a_life_is_replayed_from_its_seed() -> None:
    first, again, other = (live(seed) for seed in (7, 7, 8))
    assert (first.world.digest, first.world.turns) == (again.world.digest, again.world.turns)
    assert first.world.digest != other.world.digest


def test_an_error_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "release", lambda pool, block: None)
    with pytest.raises(AssertionError) as caught:
        live(0, 50)
    assert "python -m tests.support.simulation --seed 0 --steps 50" in caught.value.__notes__[0]


def writes_into_shared_blocks(table: BlockTable, first: int, last: int) -> list[tuple[int, int]]:
    return []


def forgets_to_copy(table: BlockTable, first: int, last: int) -> list[tuple[int, int]]:
    ORIGINAL["make_writable"](table, first, last)
    return []


def keeps_rows_of_what_is_gone(sequence: Sequence, length: int) -> None:
    rows = dict(sequence.rows)
    ORIGINAL["truncate"](sequence, length)
    sequence.rows = rows


def keeps_keys_of_what_is_gone(sequence: Sequence, length: int) -> None:
    computed = sequence.num_computed
    del sequence.tokens[length:]
    sequence.num_computed = min(computed, length + 1)


def counts_noise_from_one(engine: Engine, work: Any) -> Any:
    return [want._replace(position=want.position + 1) for want in ORIGINAL["_wanted"](engine, work)]


def preempts_without_taking_the_blocks(scheduler: Scheduler, request: Request) -> None:
    tables = [sequence.block_table.fork(sequence.num_computed) for sequence in request.sequences.values()]
    ORIGINAL["_preempt"](scheduler, request)
    for sequence, table in zip(request.sequences.values(), tables, strict=True):
        sequence.block_table = table


def ends_twice(loop: EngineLoop, requests: list[Request]) -> None:
    ORIGINAL["abort"](loop, requests)
    for request in requests:
        loop.ends[request.id] = loop.ends.get(request.id, 0) + 1  # type: ignore[attr-defined]


def serves_nobody_at_times(scheduler: Scheduler, model: str, reserved: int = 0) -> dict[Request, int]:
    return {} if len(scheduler.running) == 2 else ORIGINAL["_share_tokens"](scheduler, model, reserved)


def finds_blocks_behind_another_text(cache: PrefixCache, parent: Prefix, tokens: list[int]) -> Prefix | None:
    same = (one for one in cache._by_block.values() if one.tokens == tuple(tokens))
    return next(same, None)


def sleeps_over_its_time(request: Request) -> bool:
    return False


def commits_drafts_unseen(view: RequestView, role: str) -> Any:
    """Takes a row that is there for another position."""
    sequence, position = view._context(role)
    return sequence.rows.get(position + 1) or view._row(role, sequence, position)


def drafts_what_is_not_finite(view: RequestView, role: str, length: int) -> Any:
    return view.rollout(role, length)


FAULTS: list[tuple[type, str, Any]] = [
    (BlockTable, "make_writable", writes_into_shared_blocks),
    (BlockTable, "make_writable", forgets_to_copy),
    (Sequence, "truncate", keeps_rows_of_what_is_gone),
    (Sequence, "truncate", keeps_keys_of_what_is_gone),
    (Engine, "_wanted", counts_noise_from_one),
    (Scheduler, "_preempt", preempts_without_taking_the_blocks),
    (Scheduler, "_share_tokens", serves_nobody_at_times),
    (PrefixCache, "find", finds_blocks_behind_another_text),
    (Request, "is_late", property(sleeps_over_its_time)),
    (EngineLoop, "abort", ends_twice),
    (RequestView, "row", commits_drafts_unseen),
    (RequestView, "draft", drafts_what_is_not_finite),
]
# The first life where a fault shows that few lives come to: of drafts into a row that is not finite.
FIRST = {"draft": 32}
ORIGINAL = {name: getattr(owner, name) for owner, name, _ in FAULTS}


# No address in a name: tests that run side by side have to be the same.
@pytest.mark.parametrize(
    ("owner", "name", "fault"), FAULTS, ids=[f"{name}-{i}" for i, (_, name, _) in enumerate(FAULTS)]
)
def test_a_planted_fault_is_noticed(
    owner: type, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises((AssertionError, NumericalError)):
        many_lives(FIRST.get(name, 0), 3_000)


@pytest.mark.parametrize("carries", [True, False])
def test_a_draft_that_comes_to_a_row_that_is_not_finite_ends_no_text(carries: bool) -> None:
    """The policy may never ask for it: without drafts the text is written to its end."""
    ended = dict.fromkeys(("length", "error"), 0)
    for seed in range(10):
        rng = random.Random(seed)
        world = World(Setup(nan_in=150, agreement=4, carries=carries), stride=40)
        for _ in range(4):
            prompt = [rng.randrange(2, VOCAB) for _ in range(5)]
            params = SamplingParams(max_tokens=40, ignore_eos=True)
            world.submit(prompt, params, Nudging(0.4, "token"), 8)
        world.drain()
        ended = {how: count + world.finished[how] for how, count in ended.items()}
    assert min(ended.values()) > 5


def test_a_generation_that_waits_gives_way_to_those_before_it() -> None:
    world = World(Setup(block_size=1, blocks=(30, 30)))
    generation = world.open([2, 3], Base())
    world.extend(generation, GREEDY)
    while world.jobs:
        world.turn()
    assert world.llm._engine.runners["base"].pool.num_available < 20
    # Both come at once: the generation waits with its cache, and the request before it needs nearly all.
    world.submit([4, 5], SamplingParams(max_tokens=24, ignore_eos=True), Base(), "off")
    world.extend(generation, GREEDY)
    world.drain()
    assert len(generation.token_ids) == 24


def test_a_word_is_looked_ahead_for_as_far_as_the_context_goes() -> None:
    """Behind it an end of sequence may stand, which would make the guide write all up to it."""
    for prompt in ([32, 19, 20], [20, 14, 9], [27, 12, 30], [3, 5, 29]):
        world = World(Setup(max_len=10))
        world.submit(prompt, SamplingParams(max_tokens=7), Nudging(0.6, "word"), "off")
        world.drain()


@pytest.mark.parametrize(("text", "ends"), [(" oféa", "length"), ("12 of1212 b??", "error")])
def test_a_text_is_written_as_far_as_the_context_goes(text: str, ends: str) -> None:
    """Read anew, the second has more tokens than the context before it is whole."""
    world = World(Setup(max_len=12))
    policy = Nudging(0.4, "reference", overshoot=True)
    world.submit({"base": text, "guide": text + "!"}, SamplingParams(max_tokens=5), policy, "off")
    world.drain()
    assert world.finished[ends] == 1


def test_short_requests_that_never_stop_coming_do_not_starve_a_long_prompt() -> None:
    world = World(Setup(blocks=(400, 400), max_batch_tokens=4))
    job = world.submit([2] * 100, SamplingParams(max_tokens=1), Base(), "off")
    for _ in range(150):
        while len(world.jobs) < 8:
            world.submit([3], GREEDY, Base(), "off")
        world.turn()
    assert job.handle.is_finished, f"{job.requests[0].sequences['base'].num_computed} of 100 tokens are read"
    world.drain()
