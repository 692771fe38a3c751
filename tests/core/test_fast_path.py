"""Requests carried in C++ do what they do in Python: the same texts, in the same steps, at the same cost."""

import io
import json
import random
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.api.outputs import Stats
from nudging.core.fast_path import FastPath
from nudging.core.fast_path_rules import rule_numbers
from nudging.core.request import CARRIED, Counters, Request
from nudging.core.speculation import ledger as adaptive
from nudging.core.trace import Trace
from nudging.errors import NumericalError
from nudging.executor import batch
from nudging.executor.batch import BatchBuffer, BatchShape, shape_of
from nudging.policies.protocol import Policy
from tests.core.test_scheduler import request, small_engine
from tests.support.simulated import Setup
from tests.support.simulation import World, live

LONG = SamplingParams(max_tokens=60, ignore_eos=True)
POLICIES: list[Policy] = [Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word", "<=")]
ROOMY = Setup(blocks=(400, 400), prefix_caching=False)


@pytest.mark.parametrize("first", range(0, 40, 8))
def test_a_life_is_the_same_whether_its_ordinary_steps_are_done_in_cpp_or_in_python(first: int) -> None:
    for seed in range(first, first + 8):
        here, there = (live(seed, carries=carries).world for carries in (True, False))
        assert (here.turns, here.preemptions, here.finished) == (
            there.turns,
            there.preemptions,
            there.finished,
        )
        assert here.digest == there.digest, f"seed {seed}"


@pytest.mark.parametrize("seed", range(16))
def test_adaptive_drafts_are_as_long_and_cost_as_much_as_in_python(seed: int) -> None:
    """One after the other, so that what drafts save is spent in one order; others share their passes."""
    ends = []
    for carries in (True, False):
        rng = random.Random(seed)
        guide, agreement = rng.choice([0.02, 0.1, 0.5]), rng.choice([4, 11, 14, 16])
        setup = replace(ROOMY, carries=carries, guide_seconds=guide, agreement=agreement)
        world = World(setup, stride=1000)
        for others in (0, 0, 1, 0, 4):
            for speculate in ("auto", *rng.choices(["off", 1, 3], k=others)):
                prompt = [rng.randrange(2, 30) for _ in range(rng.randint(1, 6))]
                policy = Nudging(rng.choice([0.25, 0.4]), rng.choice(["token", "token", "word"]))
                params = SamplingParams(max_tokens=rng.choice([7, 40]))
                world.submit(prompt, params, policy, speculate)
            world.drain()
        ends.append((world.turns, world.digest))
    assert ends[0] == ends[1]


def carried_share(world: World) -> float:
    """Of the steps until nothing is left, those in which C++ did somebody's to the end."""
    fast_path = world.engine.fast_path
    assert fast_path is not None
    carried = steps = 0
    while world.jobs:
        steps += 1
        before = set(fast_path._carried)
        world.turn()
        carried += not before.isdisjoint(fast_path._carried)
    return carried / steps


@pytest.mark.parametrize("draft_len", ["off", 1, 4])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "params",
    [
        LONG,
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, top_k=20, seed=3),
        SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={7: 4.0}, stop=("zzz", "a of a of")),
    ],
    ids=["greedy", "sampled", "stops"],
)
def test_built_in_policies_are_carried_from_the_first_token_to_the_last(
    policy: Policy, draft_len: Any, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, carry = [], Request.carry

    def counted(request: Request, fast_path: FastPath) -> None:
        came.append(request.id)
        carry(request, fast_path)

    monkeypatch.setattr(Request, "carry", counted)
    # A guide that lags may find what it needs in the cache, which Python does.
    world = World(replace(ROOMY, prefix_caching=len(policy.roles) == 1), stride=1000)
    for number in range(3):
        world.submit([2 + number, 3, 5, 7, 11], params, policy, draft_len)
    assert carried_share(world) > 0.9
    assert len(came) == len(set(came)) == 3, "each came once, and was never handed back before its end"


def test_others_are_not() -> None:
    world = World(ROOMY, stride=1000)
    world.submit([2, 3], SamplingParams(max_tokens=9, logprobs=1), Base(), "off")
    world.submit([2, 3], SamplingParams(max_tokens=9, stop=("\ufffd",)), Base(), "off")
    world.submit({"base": "a b", "guide": "a"}, LONG, Nudging(0.4, "reference", overshoot=True), "off")
    assert carried_share(world) == 0.0
    _, roles = small_engine(20)
    assert rule_numbers(request(roles, "r", 3, 9, Nudging(0.4, "word"))) is None, "it has no tokenizer"


def test_a_timeline_tells_what_is_computed_of_carried_requests() -> None:
    world = World(ROOMY, stride=1000)
    file = io.StringIO()
    world.engine._tracer = Trace(file)
    job = carried_request(world, Base())
    world.turn()
    assert job.is_carried
    passes = [event["args"] for event in json.loads(file.getvalue() + "]") if event["name"] == "pass"]
    assert passes[-1] == {"rows": 1, f"{job.id} base": "4:5, 1 answers"}
    world.drain()


def carried_request(world: World, policy: Policy = POLICIES[2]) -> Any:
    job = world.submit([2, 3, 5, 7], LONG, policy, 4)
    while not job.requests[0].is_carried:
        world.turn()
    return job.requests[0]


@pytest.mark.parametrize("name", CARRIED)
def test_who_asks_for_what_is_carried_takes_the_request_back_and_it_goes_on(name: str) -> None:
    world = World(ROOMY, stride=1000)
    request = carried_request(world)
    for _ in range(5):
        world.turn()
    assert request.is_carried
    getattr(request, name)
    assert not request.is_carried
    request.check()
    world.engine.check()
    world.turn()
    world.turn()
    assert request.is_carried, "it is carried again"
    world.drain()


def test_what_other_threads_may_read_is_read_while_the_request_is_carried() -> None:
    world = World(ROOMY, stride=1000)
    request = carried_request(world)
    for _ in range(8):
        world.turn()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.append((list(request.pieces), request.counters)))
    reader.start()
    reader.join()
    assert request.is_carried
    pieces, counters = seen[0]
    stats = world.engine.stats()
    assert request.is_carried
    assert stats.totals.passes == counters.passes
    assert sum(stats.totals.tokens.values()) == len(pieces) == len(request.output)
    assert [piece.token for piece in pieces] == request.output
    assert counters == request.counters, "the same counts, taken back"
    world.drain()


def test_who_reads_while_the_request_is_handed_back_reads_what_came_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(ROOMY, stride=1000)
    request = carried_request(world)
    for _ in range(5):
        world.turn()
    counted, asked = FastPath.counters, 0

    def handed_back_first(fast_path: FastPath, one: Request) -> Counters:
        """The engine's thread is quicker."""
        nonlocal asked
        asked += 1
        one.bring_back()
        return counted(fast_path, one)

    monkeypatch.setattr(FastPath, "counters", handed_back_first)
    seen = request.counters
    assert not request.is_carried
    assert asked == 1
    assert seen is request.counters, "what is there now, not what the fast path had"
    assert len(request.pieces) == len(request.output) > 0
    world.drain()


def test_a_carried_request_has_no_more_attributes_than_another_one() -> None:
    world = World(ROOMY, stride=1000)
    request = carried_request(world)
    with pytest.raises(AttributeError, match="Request has no attribute 'nothing'"):
        _ = request.nothing
    assert request.is_carried, "asking for it changes nothing"
    world.drain()


def test_an_abort_while_carried_keeps_what_was_written() -> None:
    world = World(ROOMY, stride=1000)
    request = carried_request(world)
    for _ in range(8):
        world.turn()
    written = len(request.pieces)
    world.cancel(world.jobs[0])
    world.turn()
    assert request.finish_reason == "abort"
    assert len(request.output) == len(request.pieces) == written > 3
    world.drain()


def test_a_row_that_is_not_finite_ends_the_carried_request_that_needs_it_alone() -> None:
    world = World(ROOMY, stride=1000)
    jobs = [world.submit([2, 3, number], LONG, Base(), "off") for number in (5, 6)]
    while not all(job.requests[0].is_carried for job in jobs):
        world.turn()
    jobs[0].may_fail = True
    runner = world.llm.runners[0]
    runner.nan_rows = {runner.rows_made}
    world.turn()
    failed, other = (job.requests[0] for job in jobs)
    assert isinstance(failed.error, NumericalError)
    assert other.is_carried
    world.drain()
    assert other.finish_reason == "length"


def test_one_that_outgrows_its_share_of_the_blocks_is_handed_back_and_preempted_as_in_python() -> None:
    """Two requests that fit alone and not together."""
    setup = Setup(blocks=(24, 24), prefix_caching=False)
    ends = []
    for carries in (True, False):
        world = World(Setup(**{**vars(setup), "carries": carries}), stride=1000)
        for number in (5, 6):
            world.submit([2, 3, number], LONG, Nudging(0.4, "token"), "off")
        world.drain()
        ends.append((world.turns, world.preemptions, world.digest))
    assert ends[0] == ends[1]
    assert ends[0][1] > 0


def test_the_batch_is_the_one_that_python_writes() -> None:
    """Rows of carried requests and of others in one batch, padded and not."""
    world = World(ROOMY, stride=1000)
    runner = world.llm.runners[0]
    compared: list[bool] = []

    def compare(works: Any, wanted: Any, fast_path: FastPath | None = None) -> Any:
        if fast_path is not None and works:
            core = fast_path.core
            for work in works:
                sequence = work.request.sequences[work.role]
                ids, table = sequence.tokens[work.start : work.end], sequence.block_table.ids
                core.add_foreign(ids, work.start, work.end, work.first_row, work.ahead, table)
            sizes = BatchShape(*core.sizes(4))
            same = [*map(FakeWork, core.spans(), core.path_lengths()), *works]
            compared.append(sizes == shape_of(same, 4))
            for rows in (0, 5):
                shape = sizes._replace(rows=sizes.rows + rows, seqs=sizes.seqs + 1, answers=sizes.answers + 1)
                here = filled(shape, lambda buffer: buffer.fill_carried(core, 4))
                there = filled(shape, lambda buffer: buffer.fill(same, 4))
                compared.append(here == there)
        return type(runner).execute(runner, works, wanted, fast_path)

    runner.execute = compare  # type: ignore[method-assign]
    world.submit([2, 3, 5, 7], LONG, Nudging(0.4, "token"), 4)
    world.submit([2, 3, 6], SamplingParams(max_tokens=20, logprobs=1, ignore_eos=True), Base(), "off")
    world.drain()
    assert len(compared) > 10
    assert all(compared)


class FakeWork:
    """A span of the fast path as the Python side sees works."""

    def __init__(self, span: Any, path_length: int) -> None:
        _, _, self.start, self.end, self.first_row, ids, table, _ = span
        self.ahead, self.role, self.request = path_length - 1, "any", self
        self.answers = self.end - self.first_row + 1
        self.tokens = [0] * self.start + ids
        self.sequences = {"any": self}
        self.block_table = type("Table", (), {"ids": table})


def test_constants_are_those_of_the_twins() -> None:
    twins = {**vars(adaptive), **vars(batch)}
    compared = []
    for file in (Path(__file__).parents[2] / "csrc").glob("**/*"):
        if file.parent.name in ("host", "nudging"):
            for line in re.findall(r"^constexpr [^;]*", file.read_text(), re.MULTILINE):
                found = re.findall(r"([A-Z][A-Z_]+) = ([\d.']+)", line)
                compared += [(name, float(value.replace("'", ""))) for name, value in found if name in twins]
    assert dict(compared) == {name: twins[name] for name, _ in compared}
    assert {"ALLOWANCE", "GAIN", "WIDTH_STEP", "IMPOSSIBLE_BLOCK"} <= dict(compared).keys()


def filled(shape: BatchShape, fill: Any) -> list[Any]:
    made = fill(BatchBuffer(shape, torch.device("cpu"), spare_slot=4 * 400))
    return [
        field.tolist()
        for field in (
            made.ids, made.positions, made.slot_mapping, made.cu_seqlens_q, made.seq_lens,
            made.block_tables, made.logit_rows,
        )
    ]  # fmt: skip


def untimed(stats: Stats) -> Stats:
    return replace(stats, ttft_ms=None, tpot_ms=None)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_real_models_write_the_same_either_way(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["What is the capital of France?", "Tell me about cats.", "1 2 3 4"]
    params = [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, temperature=0.7, top_p=0.9, seed=5),
        SamplingParams(max_tokens=30, stop=(".",)),
    ]
    texts = []
    for carries in (True, False):
        if not carries:
            monkeypatch.setattr("nudging.core.fast_path.rule_numbers", lambda request: None)
        with LLM.pocket(speculate=3) as llm:
            texts.append([out.outputs[0] for out in llm.generate(prompts, params, policy)])
    for here, there in zip(*texts, strict=True):
        assert (here.token_ids, here.authors, here.text) == (there.token_ids, there.authors, there.text)
        assert untimed(here.stats) == untimed(there.stats)


def test_what_a_rule_says() -> None:
    world = World(ROOMY, stride=1000)
    request = carried_request(world, Nudging(0.3, "word", "<="))
    assert rule_numbers(request) == (2, 0.3, True, 16)
    world.drain()
