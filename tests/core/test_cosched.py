"""Models that share a device take turns so that a dear pass answers as many requests as it can."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nudging import Base, Nudging, SamplingParams
from nudging.core.coscheduling import cheapest_first, path_steps
from nudging.core.engine import Engine
from nudging.core.request import Request
from nudging.policies.protocol import Policy
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from tests.support.fake import FixedCosts, TableTokenizer, fake_engine

VOCAB = 32
LENGTH = 60
TOKENIZER = TableTokenizer([b" x" if token % 3 else b"y" for token in range(VOCAB)])
COSTS = {"base": FixedCosts(1.0, 0.002), "guide": FixedCosts(0.1, 0.0002)}


def row(token: int, prob: float) -> Tensor:
    logits = torch.zeros(VOCAB)
    logits[token % VOCAB] = math.log(prob / (1 - prob) * (VOCAB - 1))
    return logits


@dataclass(frozen=True)
class Processor:
    """A pass costs what reading the weights does, or what its products do: those of a row, of an answer."""

    read: float
    row: float
    answer: float

    def of(self, rows: float, answers: float) -> float:
        return max(self.read, self.row * rows + self.answer * answers)

    def record(self, rows: int, answers: int, seconds: float) -> None:
        """Timings change nothing."""


# Milliseconds of models of 100 and 10 million parameters on two cores without AMX (benchmarks/LOG.md).
PROCESSOR = {"base": Processor(6.4, 0.55, 0.15), "guide": Processor(0.5, 0.04, 0.064)}


def models(agreement: float = 0.85, unsure: float = 0.1) -> dict[str, Callable[[list[int]], Tensor]]:
    """A base that is now and then unsure, and a guide that mostly agrees with it."""

    def draw(ids: list[int], salt: int) -> float:
        return random.Random(hash((tuple(ids[-3:]), len(ids), ids[0], salt))).random()

    def base(ids: list[int]) -> Tensor:
        return row(7 * ids[-1] + len(ids), 0.2 if draw(ids, 1) < unsure else 0.9)

    def guide(ids: list[int]) -> Tensor:
        return row(7 * ids[-1] + len(ids) + (draw(ids, 2) >= agreement), 0.9)

    return {"base": base, "guide": guide}


def cost_per_token(
    count: int,
    policy: Policy,
    draft_len: int | None,
    costs: Mapping[str, FixedCosts | Processor] = COSTS,
    agreement: float = 0.85,
    length: int = LENGTH,
    carries: bool = True,
) -> float:
    """What `count` requests at once cost, passes counted and not timed, by the tokens they write."""
    engine, fakes = fake_engine(models(agreement), costs, num_blocks=4000, carries=carries)
    roles = {name: replace(role, tokenizer=TOKENIZER) for name, role in fakes.items()}
    spent = 0.0

    def counted(name: str) -> None:
        execute = engine.runners[name].execute

        def run(works, wanted, fast_path=None):  # type: ignore[no-untyped-def]
            nonlocal spent
            rows = engine.fast_path.num_tokens + sum(work.end - work.start for work in works)
            answers = engine.fast_path.num_answers + sum(work.answers for work in works)
            spent += costs[name].of(rows, answers)
            return execute(works, wanted, fast_path)

        engine.runners[name].execute = run  # type: ignore[method-assign]

    for name in roles:
        counted(name)
    requests = []
    for i in range(count):
        prompts = {name: RolePrompt([i % VOCAB, 2, 3]) for name in roles}
        # Unlike lengths: the requests do not stay in step by themselves.
        params = SamplingParams(max_tokens=length + i % 7)
        requests.append(Request(f"r{i}", policy, params, 0, prompts, roles, draft_len))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    assert all(request.error is None for request in requests)
    return spent / sum(len(request.output) for request in requests)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_drafts_pay_for_many_requests_as_they_do_for_one(count: int) -> None:
    """Drafting requests out of step would each have a dear pass of their own."""
    policy = Nudging(0.4, "token")
    base = cost_per_token(count, Base(), 0)
    assert cost_per_token(count, policy, 4) < 0.65 * base
    assert cost_per_token(count, policy, 0) < 1.12 * base


@pytest.mark.parametrize("row_cost", [0.002, 0.05, 0.3])
@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_drafts_that_pay_alone_are_not_made_where_rows_are_dear(count: int, row_cost: float) -> None:
    """Where many requests fill a pass, a drafted row costs like any other."""
    policy = Nudging(0.4, "token")
    costs = {"base": FixedCosts(1.0, row_cost), "guide": FixedCosts(0.1, 0.1 * row_cost)}
    lazy, four, adaptive = (cost_per_token(count, policy, k, costs) for k in (0, 4, None))
    assert adaptive <= 1.02 * lazy
    # The first drafts wait for savings to pay for them: a fixed length is ahead by that.
    assert adaptive <= 1.4 * min(lazy, four)


@pytest.mark.parametrize("agreement", [0.0, 0.6, 0.97])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64])
def test_drafts_cost_nothing_where_many_share_a_processor(count: int, agreement: float) -> None:
    """However many requests, and whether the models agree or not: never beyond lazy's cost; and where they
    agree and a pass has rows to spare, no more than the base alone.
    """
    policy, length = Nudging(0.4, "word"), 120 if count <= 8 else 60
    base, lazy, adaptive = (
        cost_per_token(count, policy, k, PROCESSOR, agreement, length)
        for policy, k in ((Base(), 0), (policy, 0), (policy, None))
    )
    print(f"{count} at {agreement}: base {base:.3f}, lazy {lazy / base:.3f}, adaptive {adaptive / base:.3f}")
    assert adaptive <= 1.02 * lazy
    if agreement > 0.9 and count <= 4:
        assert adaptive <= base / 0.97


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_where_rows_cost_little_guides_write_on_while_others_write(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word waits for the guide's next sixteen tokens: the fewer passes that takes, the better."""
    policy = Nudging(0.4, "word")
    together = cost_per_token(count, policy, None, COSTS, 0.97)
    assert cost_per_token(count, policy, None, COSTS, 0.97, carries=False) == pytest.approx(together)
    monkeypatch.setattr("nudging.core.speculation.ledger.MANY_ROWS", 0)
    by_themselves = cost_per_token(count, policy, None, COSTS, 0.97, carries=False)
    print(f"{count}: {by_themselves:.3f} -> {together:.3f}")
    assert together < 0.93 * by_themselves


def test_a_path_is_one_unit_of_work() -> None:
    """A draft of eight tokens and the pass that verifies it are one step of the engine."""
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), COSTS)
    prompts = {name: RolePrompt([1, 2, 3]) for name in roles}
    request = Request("r", Nudging(0.4, "token"), SamplingParams(max_tokens=90), 0, prompts, roles, 8)
    engine.add(request)
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert request.counters.passes == {"base": 10, "guide": 10 * 8}
    assert steps <= 11


def drafting(engine: Engine, roles: dict[str, Role], prompt: list[int], draft_len: int) -> Request:
    prompts = {name: RolePrompt(list(prompt)) for name in roles}
    params = SamplingParams(max_tokens=90)
    job = Request(f"d{draft_len}", Nudging(0.4, "token"), params, 0, prompts, roles, draft_len)
    engine.add(job)
    return job


def test_unlike_paths_are_answered_by_one_pass_where_that_gives_more() -> None:
    """Two answers in 1.6 + 1 are more than one in 0.6 + 1; nobody else is ready."""
    costs = {"base": FixedCosts(0.2, 0.4), "guide": FixedCosts(0.2)}
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), costs)
    jobs = [drafting(engine, roles, [1, 2, 3], draft_len) for draft_len in (3, 8)]
    engine.step()
    assert [job.counters.passes for job in jobs] == [{"guide": 3, "base": 1}, {"guide": 8, "base": 1}]
    assert [len(job.output) for job in jobs] == [4, 9]


def test_paths_of_the_dearest_model_go_on_together() -> None:
    """Nobody waits for its answers with a path of another model: as far as the shortest, all at once."""
    costs = {"base": FixedCosts(0.1), "guide": FixedCosts(1.0)}
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), costs)
    jobs = [drafting(engine, roles, [1, 2, 3], draft_len) for draft_len in (3, 8)]
    engine.step()
    assert [job.counters.passes for job in jobs] == [{"guide": 3}, {"guide": 3}]


def test_a_path_gets_one_token_a_step_where_many_are_ready() -> None:
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), COSTS, num_blocks=2000)
    job = drafting(engine, roles, [1, 2, 3], 8)
    prompts = {name: RolePrompt([1, 2, 3]) for name in roles}
    for i in range(30):
        engine.add(Request(f"b{i}", Base(), SamplingParams(max_tokens=60), 0, prompts, roles, 0))
    for steps in range(1, 8):
        engine.step()
        assert job.counters.passes == {"guide": steps}


def test_a_path_takes_no_block_that_it_does_not_write() -> None:
    engine, roles = fake_engine(models(agreement=1.0, unsure=0.0), COSTS)
    job, pool = drafting(engine, roles, [1, 2, 3, 4], 8), engine.runners["guide"].pool
    engine.step()
    assert job.sequences["guide"].num_computed == 11
    # The next path ends with token 20, the last one of the fifth block.
    while pool.num_available > 2:
        pool.allocate()
    engine.step()
    assert (job.counters.passes, pool.num_available) == ({"guide": 16, "base": 2}, 0)
    assert job.sequences["guide"].num_computed == 20


def test_what_needs_the_base_only_is_answered_in_every_step() -> None:
    """Others' drafts, which may take many steps, do not stand in its way."""
    engine, roles = fake_engine(models(), COSTS)
    prompts = {name: RolePrompt([1, 2, 3]) for name in roles}
    params = SamplingParams(max_tokens=40)
    for i in range(3):
        engine.add(Request(f"n{i}", Nudging(0.4, "token"), params, 0, prompts, roles, 8))
    alone = Request("b", Base(), params, 0, prompts, roles, 0)
    engine.add(alone)
    engine.step()
    while not alone.is_finished:
        before = len(alone.output)
        engine.step()
        assert len(alone.output) == before + 1


def test_paths_go_on_for_as_long_as_the_answer_is_worth_waiting_for() -> None:
    # One request: its whole path, whatever it costs.
    assert path_steps([8], 0, 0.5, 1.0) == 8
    # Two: waiting for the longer path gives 2 answers in 2.6 instead of 1 in 1.8.
    assert path_steps([8, 16], 0, 0.1, 1.0) == 16
    assert path_steps([2, 16], 0, 0.1, 1.0) == 2
    # Many that are ready do not wait for one path, but for one token of it: no path stands still.
    assert path_steps([16], 63, 0.1, 1.0) == 1
    assert path_steps([4] * 60, 4, 0.1, 1.0) == 4
    assert path_steps([4] * 60, 4, 10.0, 1.0) == 4
    assert path_steps([4], 60, 10.0, 1.0) == 1


def test_the_most_answers_per_time_are_chosen() -> None:
    rng = random.Random(0)
    for _ in range(500):
        lengths = [rng.randint(1, 16) for _ in range(rng.randint(1, 8))]
        ready, step, answer = rng.randrange(8), rng.choice([0.05, 0.2, 1.0]), 1.0

        def rate(steps: int) -> float:
            joined = sum(length <= steps for length in lengths)  # noqa: B023 - called below, at once
            return (ready + joined) / (steps * step + answer)  # noqa: B023

        chosen = path_steps(lengths, ready, step, answer)
        assert rate(chosen) == max(rate(s) for s in range(1, 17))


def test_the_cheapest_model_goes_first() -> None:
    """By a pass of one row."""
    assert cheapest_first({"a": FixedCosts(1.5), "b": FixedCosts(0.0, 1.0)}) == ["b", "a"]
    assert cheapest_first({"base": FixedCosts(3.0), "guide": FixedCosts(1.0), "x": FixedCosts(2.0)}) == [
        "guide",
        "x",
        "base",
    ]
