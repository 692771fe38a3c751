"""Whole cycles that the device runs ahead of the host, checked without a device.

`Late` stands in for one: a cycle that was started runs when somebody waits for it, or when an ordinary pass
is made, and not before, as on a device whose host never waits.  Everything else is as in test_graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nudging import LLM, Base, Guide, Nudging, NumericalError, SamplingParams
from nudging.api.handle import Handle
from nudging.api.outputs import CompletionOutput
from nudging.core.speculation.pass_costs import PassCosts
from nudging.core.work import Work
from nudging.executor.cycles.recorded_cycle import RecordedCycle
from nudging.executor.cycles.slots import Slot
from nudging.executor.graph_runner import GraphRunner
from nudging.kernels.draft_verify import BASE_EOS, GUIDE_EOS, Verified
from nudging.kernels.rms_norm import Norm
from nudging.models.batch import Batch
from nudging.models.kv_cache import KVCache
from nudging.policies import Policy
from tests.executor.test_graphs import Recording, one_replay, recording_llm
from tests.support.pairs import Twin, assert_pools_are_whole, at_once, held, written

TOKEN = Nudging(0.4, "token")
ARMS: list[tuple[Policy, Any]] = [(TOKEN, 2), (TOKEN, 5), (TOKEN, "auto"), (Base(), "off"), (Guide(), 4)]


def let_pay(monkeypatch: pytest.MonkeyPatch, *lengths: int) -> None:
    """Drafts of these lengths pay, one after the other, whatever they cost."""
    turn = itertools.cycle(lengths)

    def length(ledger: Any, reader: str, rows: int, drafting: Any, limit: int) -> int:
        return min(next(turn), limit)

    monkeypatch.setattr("nudging.core.speculation.drafting.draft_length", length)


class Late(Recording):
    """Starts cycles late, in order; counts those that were waited for while a later one was under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.cycles = self.ahead = self.passes = 0
        self.queue: list[Callable[[], None]] = []
        launch, execute, copy = RecordedCycle._launch, GraphRunner._execute, KVCache.copy_blocks

        def start(cycle: RecordedCycle, *args: Any) -> None:
            self.cycles += 1
            self.queue.append(partial(launch, cycle, *args))

        def pass_(runner: GraphRunner, *args: Any) -> Any:
            self._run(len(self.queue))
            self.passes += 1
            return execute(runner, *args)

        def copied(cache: KVCache, pairs: list[tuple[int, int]]) -> None:
            self._run(len(self.queue) if pairs else 0)
            copy(cache, pairs)

        monkeypatch.setattr(RecordedCycle, "_launch", start)
        monkeypatch.setattr(GraphRunner, "_execute", pass_)
        monkeypatch.setattr(KVCache, "copy_blocks", copied)

    def _run(self, count: int) -> None:
        for thunk in self.queue[:count]:
            with torch.inference_mode():
                thunk()
            assert not [ref for ref in self.allocated if ref() is not None], "a cycle's memory outlives it"
        del self.queue[:count]

    def mark(self) -> Callable[[], None]:
        last = self.queue[-1]

        def wait() -> None:
            self.waited += 1
            self.ahead += last is not self.queue[-1] if self.queue else 0
            if last in self.queue:
                self._run(self.queue.index(last) + 1)

        return wait


def prompts_and_params(count: int, **more: Any) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of unlike lengths; every other text ends where it likes, every second pair is sampled."""
    prompts = [[60 + i + j for j in range(3 + 7 * i)] for i in range(count)]
    options = {"max_tokens": 40} | more
    return prompts, [
        SamplingParams(ignore_eos=i % 2 == 0, temperature=0.8 * (i // 2 % 2), seed=i, **options)
        for i in range(count)
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8, 11, 15])
def test_cycles_write_what_the_oracle_writes(
    tiny_pair: dict[str, Path], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a batch; the first runs of a shape are made of passes, the next ones of cycles."""
    prompts, params = prompts_and_params(4)
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        twin = Twin(llm)
        expected = [twin.generate(*job, TOKEN) for job in zip(prompts, params, strict=True)]
        assert {author for text in expected for author in text.authors} == {"base", "guide"}
        one = k % 4
        for _ in range(2):
            output = llm.generate(prompts[one], params[one], TOKEN, k)[0].outputs[0]
            assert written(output) == expected[one]
        for _ in range(2):
            assert [written(r.outputs[0]) for r in at_once(llm, prompts, params, TOKEN, k)] == expected
        assert_pools_are_whole(llm)
    assert late.cycles > 2 * 40 // (k + 1)


def test_a_cycle_is_one_replay_and_one_wait_and_the_next_one_is_under_way(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs the host is counted on a text in its steady state, beside the same text of passes."""
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    with LLM(**tiny_pair, kv_cache_memory="4MiB", prefix_caching=False) as plain:
        ordinary = plain.generate([60, 61, 62], params, TOKEN, 4)[0].outputs[0]
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair, prefix_caching=False) as llm:
        for _ in range(3):
            counts = late.cycles, late.replayed, late.waited, late.ahead, late.passes
            output = llm.generate([60, 61, 62], params, TOKEN, 4)[0].outputs[0]
        now = late.cycles, late.replayed, late.waited, late.ahead, late.passes
    assert written(output) == written(ordinary)
    cycles, replays, waits, ahead, passes = (b - a for a, b in zip(counts, now, strict=True))
    # The prompts with the first draft of four tokens; the last token, which needs no draft.
    assert passes <= 5 + 2
    drafts = sum(output.stats.accepted_lengths)
    assert drafts - 3 <= cycles <= drafts + 6
    assert replays - passes <= cycles <= replays
    assert waits <= cycles
    assert ahead >= waits - 6
    # The guide's next token is the first of its draft where the base leaves it to the guide.  The texts are
    # not cut into the same drafts.
    assert output.stats.guide_passes <= 1.02 * ordinary.stats.guide_passes
    assert output.stats.nudged_tokens == ordinary.stats.nudged_tokens
    assert output.stats.base_passes <= 1.1 * ordinary.stats.base_passes


@pytest.mark.parametrize("speculate", [4, "auto"])
def test_many_texts_stay_in_step(
    tiny_pair: dict[str, Path], speculate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had to let the guide write one token alone would be late by it, and all would begin anew;
    likewise for who has one token left to write.
    """
    prompts = [[60 + i + j for j in range(3 + i)] for i in range(12)]
    params = [SamplingParams(max_tokens=90, ignore_eos=True, temperature=0.7, seed=i) for i in range(12)]
    late = Late(monkeypatch)
    let_pay(monkeypatch, 4)
    with recording_llm(monkeypatch, late, **tiny_pair, prefix_caching=False) as llm:
        twin = Twin(llm)
        expected = [twin.generate(*job, TOKEN) for job in zip(prompts, params, strict=True)]
        for _ in range(4):
            counts = late.cycles, late.ahead, late.passes
            texts = at_once(llm, prompts, params, TOKEN, speculate)
            assert [written(text.outputs[0]) for text in texts] == expected
        cycles, ahead, passes = (
            b - a for a, b in zip(counts, (late.cycles, late.ahead, late.passes), strict=True)
        )
        assert_pools_are_whole(llm)
    longest = max(sum(text.outputs[0].stats.accepted_lengths) for text in texts)
    assert longest <= cycles <= longest + 2
    assert ahead >= cycles - 3, "a text that ends keeps nobody waiting"
    # The prompts with the first draft of four tokens; and of each text the last token, at most.
    assert passes <= 5 + len(texts)


@pytest.mark.parametrize(("policy", "speculate"), [(TOKEN, 4), (Base(), "off")])
def test_who_comes_later_takes_part_in_the_next_cycle(
    tiny_pair: dict[str, Path], policy: Policy, speculate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is a pass; the text behind it, but for the last token, is of cycles."""
    prompts, late = [[60 + i, 70, 80 + i] for i in range(3)], Late(monkeypatch)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (150, 150, 60)]
    passes: list[Work] = []
    execute = GraphRunner._execute

    def noted(runner: GraphRunner, works: list[Work], wanted: Any) -> Any:
        passes.extend(work for work in works if len(work.request.prompts["base"].ids) == 4)
        return execute(runner, works, wanted)

    monkeypatch.setattr(GraphRunner, "_execute", noted)
    prompts[2].append(90)
    with recording_llm(monkeypatch, late, **tiny_pair, prefix_caching=False) as llm:
        twin = Twin(llm)
        expected = [twin.generate(*job, policy) for job in zip(prompts, params, strict=True)]
        for _ in range(4):
            passes.clear()
            with held(llm):
                first = [
                    llm.submit(*job, policy, speculate) for job in zip(prompts[:2], params, strict=False)
                ]
                third: list[Handle] = []

                def come(third: list[Handle] = third, second: Handle = first[1]) -> None:
                    # On the engine's thread, between two steps: however busy the machine is, it comes there.
                    if not third and second._requests[0].output:
                        third.append(llm.submit(prompts[2], params[2], policy, speculate))

                first[1].add_listener(come)
            texts = [handle.result().outputs[0] for handle in first]
            assert [written(text) for text in (*texts, third[0].result().outputs[0])] == expected
        assert_pools_are_whole(llm)
    # Behind the prompt, and the draft that was made with it.
    behind = [(work.role, work.start) for work in passes if work.start >= (8 if speculate == 4 else 4)]
    assert len(behind) <= (2 if speculate == 4 else 0), "the last token, of drafts"


@pytest.mark.parametrize("policy", [Base(), Guide()])
def test_one_model_alone_goes_from_token_to_token(
    tiny_pair: dict[str, Path], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay and a wait a token, while the next one is under way; the last token is no exception."""
    prompts, params = prompts_and_params(4)
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        twin = Twin(llm)
        expected = [twin.generate(*job, policy) for job in zip(prompts, params, strict=True)]
        for _ in range(2):
            assert [written(r.outputs[0]) for r in at_once(llm, prompts, params, policy)] == expected
        long = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0.5, seed=1)
        want = twin.generate(prompts[0], long, policy)
        for _ in range(3):
            counts = late.cycles, late.replayed, late.waited, late.ahead, late.passes
            assert written(llm.generate(prompts[0], long, policy, 4)[0].outputs[0]) == want
        now = late.cycles, late.replayed, late.waited, late.ahead, late.passes
        assert_pools_are_whole(llm)
    cycles, replays, waits, ahead, passes = (b - a for a, b in zip(counts, now, strict=True))
    assert passes == 1, "the prompt"
    assert 99 <= cycles <= 101
    # The prompt of this length was recorded, too.
    assert replays - 1 <= cycles <= replays
    assert 98 <= ahead <= waits <= 100


def test_drafts_of_changing_length_are_changed_in_flight(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lengths would pay: now and then none, in the third round all of them recorded."""
    prompts, params = prompts_and_params(3, max_tokens=60)
    late = Late(monkeypatch)
    let_pay(monkeypatch, 3, 3, 3, 5, 5, 1, 2, 8, 8, 8, 8, 4, 4, 4, 0, 0)
    monkeypatch.setattr("nudging.executor.cycles.cycle_cache.PATIENCE", 2)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        twin = Twin(llm)
        expected = [twin.generate(*job, TOKEN) for job in zip(prompts, params, strict=True)]
        for _ in range(6):
            for one in (0, 2):
                output = llm.generate(prompts[one], params[one], TOKEN, "auto")[0].outputs[0]
                assert written(output) == expected[one]
            counts = late.cycles, late.ahead
            assert [written(r.outputs[0]) for r in at_once(llm, prompts, params, TOKEN, "auto")] == expected
        assert_pools_are_whole(llm)
        overlap = next(f for f in runner_of(llm).overlaps if len(f._runners) == 2)
        assert {shape.drafts for shape in overlap._cycles.shapes} >= {3, 5, 8, 4}
    cycles, ahead = late.cycles - counts[0], late.ahead - counts[1]
    assert 12 < cycles < 2 * ahead, "most are started while another one is under way"


def test_what_cycles_take_is_learned_where_nothing_else_was_done(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes ten seconds by its clock, from the end of the one before; prompts teach what they take."""
    late, learned = Late(monkeypatch), []

    class Costs(PassCosts):
        def record(self, rows: int, answers: int, seconds: float) -> None:
            learned.append((self, rows, answers, seconds))

    with recording_llm(monkeypatch, late, **tiny_pair, prefix_caching=False) as llm:
        engine, base, guide = llm._engine, *(llm.roles[role].model for role in ("base", "guide"))
        prior = {base: Costs(8 * 10**10, 0.5), guide: Costs(10**10, 0.5)}
        engine.costs.update(prior)  # type: ignore[attr-defined]
        seconds = itertools.count(step=10.0)
        for overlap in runner_of(llm).overlaps:
            overlap._clock = partial(next, seconds)
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        for policy, k in ((TOKEN, 4), (Base(), "off")):
            for _ in range(3):
                learned.clear()
                llm.generate([60, 61], params, policy, k)
            cycles = [(costs is prior[guide], *rest) for costs, *rest in learned if rest[-1] > 0.5]
            if k == 4:
                # Four passes of the guide and one of the base, eight times as dear.
                parts = [(True, 1, 1, 10 / 12), (False, 5, 5, 80 / 12)]
                assert len(cycles) > 10
                assert cycles == [pytest.approx(part) for part in parts] * (len(cycles) // 2)
            else:
                # The first token is the prompt's; the first cycle was started by itself.
                assert cycles == [(False, 1, 1, 10.0)] * 38
    assert late.cycles > 100


def test_a_first_pass_and_a_recording_teach_nothing(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    late, taught = Late(monkeypatch), []
    monkeypatch.setattr(PassCosts, "record", lambda costs, rows, *_: taught.append(rows))
    with recording_llm(monkeypatch, late, **tiny_pair, prefix_caching=False) as llm:
        for expected in ([], [], [2]):
            taught.clear()
            llm.generate([60, 61], SamplingParams(max_tokens=1), Base())
            assert taught == expected


def test_what_is_too_large_for_a_recording_is_made_of_passes(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many rows for two texts of four drafts; and too many blocks for a long one."""
    monkeypatch.setattr("nudging.executor.cycles.overlap.SIZES", (1, 2, 3, 4, 5, 6, 7, 8))
    monkeypatch.setattr("nudging.executor.cycles.overlap.WIDTHS", (8,))
    prompts = [[60, 61], [70, 71]]
    short, long = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (30, 150))
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        twin = Twin(llm)
        for params, some in ((short, prompts), (long, prompts[:1])):
            expected = [twin.generate(prompt, params, TOKEN) for prompt in some]
            for _ in range(2):
                passes = late.passes
                assert [written(r.outputs[0]) for r in at_once(llm, some, params, TOKEN, 4)] == expected
        shapes = [shape for overlap in runner_of(llm).overlaps for shape in overlap._cycles.shapes]
        assert {(shape.slots, shape.base_width) for shape in shapes} == {(1, 8)}
        # From eight blocks of sixteen tokens on.
        assert late.passes - passes > (150 - 8 * 16) / 5
        assert_pools_are_whole(llm)


def test_ends_that_only_one_model_knows_end_nothing_on_the_device(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_llm(monkeypatch, Late(monkeypatch), **tiny_pair) as llm:
        pair = next(f for f in runner_of(llm).overlaps if len(f._runners) == 2)
        ends = {"guide": frozenset({5, 10**6}), "base": frozenset({5, 7})}
        marks = pair._mark_ends(ends, llm.roles["base"].vocab_size)
        assert {i: mark for i, mark in enumerate(marks) if mark} == {5: BASE_EOS | GUIDE_EOS, 7: BASE_EOS}


def runner_of(llm: LLM) -> GraphRunner:
    runner = llm._engine.runners[llm.roles["base"].model]
    assert isinstance(runner, GraphRunner)
    return runner


def test_a_new_shape_runs_at_once_where_a_larger_one_is_recorded(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = [[60 + i, 61] for i in range(4)], SamplingParams(max_tokens=24, ignore_eos=True)
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        for _ in range(2):
            texts = [written(r.outputs[0]) for r in at_once(llm, prompts, params, TOKEN, 4)]
        seen = []
        for count in (3, 3, 1):
            before = late.cycles
            found = [written(r.outputs[0]) for r in at_once(llm, prompts[:count], params, TOKEN, 4)]
            seen.append(late.cycles - before)
            assert found == texts[:count]
    # Three fit into the recording for four; for one that would be too dear, and its own is not yet made.
    assert min(seen[:2]) > 4


def ends(output: CompletionOutput) -> tuple[Any, ...]:
    return written(output), output.text


@pytest.mark.parametrize(("policy", "speculate"), [(TOKEN, 4), (TOKEN, "auto"), (Base(), "off")])
def test_every_way_to_end_is_found_a_cycle_late(
    tiny_pair: dict[str, Path], policy: Policy, speculate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By length at each offset of a cycle, by stop ids and stop strings, others going on meanwhile."""
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    with LLM(**tiny_pair, kv_cache_memory="4MiB") as plain:
        whole = plain.generate([60, 61], free, policy)[0].outputs[0]
        stops = [SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(t,)) for t in whole.token_ids]
        words = [whole.text[i : i + 3] for i in range(0, len(whole.text) - 3, 5)]
        strings = [SamplingParams(max_tokens=40, ignore_eos=True, stop=(word,)) for word in words]
        lengths = [SamplingParams(max_tokens=n, ignore_eos=True) for n in range(1, 16)]
        params = [*stops[::4], *strings[:8], *lengths]
        jobs = [[60, 61]] * len(params)
        expected = [ends(r.outputs[0]) for r in plain.generate(jobs, params, policy)]
    let_pay(monkeypatch, 3, 3, 4)
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        for _ in range(2):
            llm.generate([60, 61], free, policy, speculate)
        for size in (1, 8):
            for at in range(0, len(params), size):
                part = slice(at, at + size)
                results = at_once(llm, jobs[part], params[part], policy, speculate)
                assert [ends(r.outputs[0]) for r in results] == expected[part]
        assert_pools_are_whole(llm)
    assert late.ahead > len(params)
    assert not late.queue, "the device is still at work when its memory is given back"


def liar(*args: Any) -> Verified:
    """A device that decides wrongly now and then: too little, or another token."""
    said = one_replay(*args)
    told = args[4].sum(dim=1) % 7
    shorter = torch.where((told == 3) & (said.written > 1), said.written - 1, said.written)
    tokens = torch.where((told == 5)[:, None], (said.tokens + 1).clamp(max=300), said.tokens)
    return said._replace(written=shorter, tokens=tokens)


def test_where_the_device_foresees_wrongly_the_text_stays(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = prompts_and_params(4)
    let_pay(monkeypatch, 3, 3, 4)
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        twin = Twin(llm)
        monkeypatch.setattr("nudging.executor.cycles.recorded_cycle.draft_verify", liar)
        for policy, k in ARMS:
            expected = [twin.generate(*job, policy) for job in zip(prompts, params, strict=True)]
            for _ in range(2):
                found = [written(r.outputs[0]) for r in at_once(llm, prompts, params, policy, k)]
                assert found == expected
        assert_pools_are_whole(llm)
    assert late.cycles > 20


def test_passes_that_go_over_a_later_cycle_undo_it(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third cycle is computed again by passes, while the one behind it is under way."""
    prompts, params = prompts_and_params(4)
    let_pay(monkeypatch, 3, 3, 4)
    late = Late(monkeypatch)
    answers, asked = Slot.answers, itertools.count()

    def refused(slot: Slot, work: Work) -> Any:
        first = "guide" if "guide" in slot.request.policy.roles else "base"
        begins = work.role == first and work.first_row == slot.end(first) and bool(slot.rows)
        return None if begins and next(asked) % 3 == 2 else answers(slot, work)

    monkeypatch.setattr(Slot, "answers", refused)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        twin = Twin(llm)
        for policy, k in ARMS:
            expected = [twin.generate(*job, policy) for job in zip(prompts, params, strict=True)]
            for _ in range(3):
                found = [written(r.outputs[0]) for r in at_once(llm, prompts, params, policy, k)]
                assert found == expected
        assert_pools_are_whole(llm)
    assert next(asked) > 20


def test_requests_come_and_go_and_lose_their_memory(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other policies, other lengths of drafts, cancelled ones and too little memory for all, in one batch."""
    prompts, params = prompts_and_params(12, max_tokens=70)
    policies = [TOKEN, Nudging(0.3, "token", "<="), TOKEN, Nudging(0.4, "word"), TOKEN, Base()] * 2
    lengths = [4, 3, "auto", 4, 4, "off", "auto", 1, 2, 3, 4, 4]
    let_pay(monkeypatch, 3, 3, 4)
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair, block_size=4, kv_cache_memory="256KiB") as llm:
        twin = Twin(llm)
        jobs = list(zip(prompts, params, policies, lengths, strict=True))
        expected = [twin.generate(*job[:3]) for job in jobs]
        for round_ in range(2):
            handles = [llm.submit(*job) for job in jobs]
            gone = [llm.submit(*job) for job in jobs[:3]]
            for index, handle in enumerate(gone):
                stream = iter(handle)
                for _ in range(3 * index + round_):
                    next(stream)
                handle.cancel()
            for handle, want in zip(handles, expected, strict=True):
                assert written(handle.result().outputs[0]) == want
            assert {handle.result().outputs[0].finish_reason for handle in gone} <= {
                "abort",
                "stop",
                "length",
            }
        preempted = llm.stats().totals.preemptions
        assert_pools_are_whole(llm)
    assert late.cycles > 20
    assert preempted > 0, late.cycles


def test_siblings_that_come_late_take_the_prompt_and_nothing_else(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share its last block with a text that the device is writing on: who writes on has to copy it."""
    prompt = [60 + i for i in range(21)]
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=3, n=6)
    with LLM(**tiny_pair, kv_cache_memory="4MiB") as plain:
        expected = [written(output) for output in plain.generate(prompt, params, TOKEN, 4)[0].outputs]
    late = Late(monkeypatch)
    copies: list[tuple[int, int]] = []
    copy = KVCache.copy_blocks

    def copied(cache: KVCache, pairs: list[tuple[int, int]]) -> None:
        copies.extend(pairs if late.cycles else [])
        copy(cache, pairs)

    monkeypatch.setattr(KVCache, "copy_blocks", copied)
    with recording_llm(monkeypatch, late, **tiny_pair, kv_cache_memory="130KiB") as llm:
        for _ in range(2):
            found = [written(output) for output in llm.generate(prompt, params, TOKEN, 4)[0].outputs]
            assert found == expected
        assert_pools_are_whole(llm)
    assert len(copies) > 3
    assert late.ahead > 20


def test_a_row_that_is_not_finite_ends_its_request_alone(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (60, 20))
    late = Late(monkeypatch)
    with recording_llm(monkeypatch, late, **tiny_pair) as llm:
        for policy, role, last in ((TOKEN, "guide", 37), (TOKEN, "base", 34), (Base(), "base", 33)):
            jobs = [[60], [70]], [long, short], policy, 4
            whole, expected = [at_once(llm, *jobs) for _ in range(3)][0]
            decoder = llm._engine.runners[llm.roles[role].model].decoder
            before_head = decoder.before_head

            def poisoned(
                batch: Batch, kv: KVCache, before_head: Any = before_head, last: int = last
            ) -> tuple[Tensor, Norm | None]:
                x, norm = before_head(batch, kv)
                with _disable_current_modes():  # the watch knows no such read
                    return torch.where(batch.positions[:, None] < last, x, float("nan")), norm

            monkeypatch.setattr(decoder, "before_head", poisoned)
            bad, good = (result.outputs[0] for result in at_once(llm, *jobs))
            monkeypatch.setattr(decoder, "before_head", before_head)
            assert (bad.finish_reason, type(bad.error)) == ("error", NumericalError)
            # The guide's row counts where the guide writes.
            assert last <= len(bad.token_ids) + 8
            assert bad.token_ids == whole.outputs[0].token_ids[: len(bad.token_ids)]
            assert written(good) == written(expected.outputs[0])
        assert_pools_are_whole(llm)
    assert late.ahead > 20
