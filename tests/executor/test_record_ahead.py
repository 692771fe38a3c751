"""Recordings that nobody has asked for yet, made while there is nothing to do."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.core import engine_loop as thread_module
from nudging.core.executor import MAX_TEXTS, record_ahead
from nudging.executor.batch import BatchBuffer, BatchShape
from nudging.executor.cuda_graphs import padded, path_shape
from nudging.executor.graph_runner import GraphRunner
from nudging.executor.model_runner import ModelRunner
from nudging.executor.warmup import Family, family_of, widths
from nudging.policies import Policy
from tests.executor.test_foresight import Late, prompts_and_params
from tests.executor.test_graphs import Recording, recording_llm, work
from tests.support.pairs import Twin, assert_pools_are_whole, written
from tests.support.waiting import PATIENCE, give_time, wait_until

TOKEN = Nudging(0.4, "token")
KINDS: list[tuple[Policy, Any]] = [
    (Base(), "off"),
    (Guide(), "off"),
    (TOKEN, "off"),
    (TOKEN, 3),
    (Nudging(0.4, "word"), 2),
]


class Warm(Late):
    """Runs what it records once before, as a GPU's recorder does."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(run)
        replay()
        return replay


class Gate(Recording):
    """Once it is closed, every recording says that it has begun and waits until it may end."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(run)
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        return replay

    def close(self) -> None:
        self.may_end.clear()
        self.begun.clear()


def runners_of(llm: LLM) -> list[GraphRunner]:
    runners = [llm._engine.runners[llm.roles[role].model] for role in ("base", "guide")]
    assert all(isinstance(runner, GraphRunner) for runner in runners)
    return runners  # type: ignore[return-value]


def made(llm: LLM) -> dict[Any, int]:
    """All recordings there are, with how many texts each is for at most."""
    found: dict[Any, int] = {}
    for index, runner in enumerate(runners_of(llm)):
        found |= {(index, key): key[0].seqs - 1 for key in (*runner._passes, *runner._paths)}
        for overlap in runner.overlaps:
            found |= {(*overlap._runners, shape): shape.slots for shape in overlap._cycles.shapes}
    return found


def one_more(llm: LLM) -> bool:
    return llm._thread.call(lambda: record_ahead(llm._engine.runners.values()))


def test_those_of_the_fewest_texts_come_first_change_nothing_and_serve_what_comes(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nudging.core.executor.MAX_TEXTS", 5)
    monkeypatch.setattr("nudging.executor.graph_runner.MAX_AHEAD", 10_000)
    prompts, params = prompts_and_params(4, max_tokens=24)
    # Alike, so that in each step all are asked for equally much.
    params = [replace(one, ignore_eos=True) for one in params]
    warm = Warm(monkeypatch)
    with recording_llm(monkeypatch, warm, **tiny_pair) as llm:
        twin = Twin(llm)
        for policy, speculate in KINDS:
            llm.generate(prompts[0], params[0], policy, speculate)
        before, caches = made(llm), [r.cache.k[:, :-1].clone() for r in runners_of(llm)]
        recorded, order = warm.recorded, []
        while one_more(llm):
            known = made(llm)
            order.append(next(texts for key, texts in known.items() if key not in before))
            assert len(known) == len(before) + 1
            before = known
        assert warm.recorded == recorded + len(order), "a shape was recorded twice"
        assert order == sorted(order)
        assert set(order) >= {1, 2, 3, 4, 5}
        for runner, cache in zip(runners_of(llm), caches, strict=True):
            assert torch.equal(runner.cache.k[:, :-1].view(torch.int32), cache.view(torch.int32))
        assert_pools_are_whole(llm)
        recorded = warm.recorded
        for policy, speculate in KINDS:
            expected = [twin.generate(*job, policy) for job in zip(prompts, params, strict=True)]
            found = llm.generate(prompts, params, policy, speculate)
            assert [written(result.outputs[0]) for result in found] == expected
            if not isinstance(policy, Nudging):
                assert warm.recorded == recorded, "four at once found their recordings there"
        assert_pools_are_whole(llm)


def test_an_idle_engine_records_and_stops_for_a_request(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_module, "IDLE_SECONDS", 0.01)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    gate = Gate()
    with recording_llm(monkeypatch, gate, **tiny_pair, record_ahead=True) as llm:
        engine, ahead = llm._engine, GraphRunner.record_ahead
        busy: list[bool] = []

        def watched(runner: GraphRunner, texts: int) -> bool:
            busy.append(engine.has_work)
            return ahead(runner, texts)

        expected = [written(llm.generate([60, 61], params, Base())[0].outputs[0]) for _ in range(3)][0]
        gate.close()
        monkeypatch.setattr(GraphRunner, "record_ahead", watched)
        assert gate.begun.wait(PATIENCE), "nothing was recorded by an idle engine"
        recorded = gate.recorded
        handle = llm.submit([60, 61], params, Base())
        give_time()
        assert gate.recorded == recorded
        gate.may_end.set()
        assert written(handle.result().outputs[0]) == expected
        assert not any(busy)
        wait_until(lambda: gate.recorded > recorded)


def test_closing_waits_for_one_recording(tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "IDLE_SECONDS", 0.01)
    gate = Gate()
    llm = recording_llm(monkeypatch, gate, **tiny_pair, record_ahead=True)
    gate.close()
    llm.submit([60, 61], SamplingParams(max_tokens=1), Base())
    assert gate.begun.wait(PATIENCE)
    recorded, closing = gate.recorded, threading.Thread(target=llm.close)
    closing.start()
    give_time()
    assert closing.is_alive()
    gate.may_end.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert gate.recorded == recorded


@pytest.mark.parametrize("recording", [None, Recording()])
def test_what_records_nothing_and_who_is_told_not_to_sleep(
    recording: Recording | None, tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a plain CPU an idle engine looks once and then sleeps; where it is switched off it never looks."""
    monkeypatch.setattr(thread_module, "IDLE_SECONDS", 0.01)
    asked: list[bool] = []

    def watched(runners: Any) -> bool:
        asked.append(record_ahead(runners))
        return asked[-1]

    monkeypatch.setattr(thread_module, "record_ahead", watched)
    options: dict[str, Any] = {**tiny_pair, "kv_cache_memory": "4MiB"}
    opened = LLM(**options) if recording is None else recording_llm(monkeypatch, recording, **options)
    with opened as llm:
        for times in (1, 2):
            if recording is None:
                wait_until(lambda times=times: len(asked) == times)  # type: ignore[misc]
            give_time(0.1)
            assert asked == [False] * (times if recording is None else 0)
            llm.generate([60, 61], SamplingParams(max_tokens=4))


def test_number_and_memory_are_bounded(tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nudging.executor.graph_runner.MAX_AHEAD", 3)
    monkeypatch.setattr("nudging.executor.cycles.cycle_cache.MAX_AHEAD", 2)
    room = False
    recording = Recording()
    monkeypatch.setattr(recording, "has_room", lambda: room)
    with recording_llm(monkeypatch, recording, **tiny_pair) as llm:
        for _ in range(2):
            llm.generate([60, 61], SamplingParams(max_tokens=20, ignore_eos=True), TOKEN, 3)
        recorded = recording.recorded
        assert not one_more(llm)
        room = True
        while one_more(llm):
            pass
    assert recording.recorded == recorded + 3 + 3 + 2


def test_a_family_has_the_shapes_of_its_batches() -> None:
    """What is recorded for a number of texts is what so many works alike are padded to."""
    for rows in (1, 2, 5, 16):
        for texts in range(1, MAX_TEXTS + 1):
            works = [work(40, 40 - rows, 40, [0] * 10) for _ in range(texts)]
            shape = padded(works, 4)
            family = family_of([work(40, 40 - rows, 40, [0] * 10)], BatchShape(0, 0, 32, 0), 9)
            assert family == Family(rows, 1, 32, 9, 0)
            assert family.shape(texts) == shape
            if shape is not None:
                path = path_shape(shape, works, 3, 4)
                assert Family(1, 1, path.width, 9, 3).shape(texts) == path
    unlike = [work(9, 6, 9, [3, 5, 7]), work(4, 3, 4, [1])]
    assert family_of(unlike, BatchShape(0, 0, 32, 0), 9) is None


def test_longer_texts_are_foreseen_where_there_can_be_any() -> None:
    assert widths(8, 1000) == (8, 16)
    assert widths(8, 8) == (8,)
    assert widths(8, 9) == (8, 16)
    assert widths(64, 3) == (64,)
    assert widths(2048, 10**6) == (2048, 4096)
    assert widths(4096, 10**6) == (4096,), "wider tables are not recorded"


def test_an_idle_batch_has_all_its_rows_in_no_pools_block() -> None:
    buffer = BatchBuffer(BatchShape(8, 3, 8, 5), torch.device("cpu"), spare_slot=4000)
    buffer.fill([work(9, 6, 9, [3, 5, 7])], 4)
    batch = buffer.fill_idle(4)
    assert batch.cu_seqlens_q.tolist() == [0, 2, 5, 8]
    assert batch.seq_lens.tolist() == [2, 3, 3]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [4000] * 8
    assert batch.block_tables.unique().tolist() == [1000]
    assert batch.ids.tolist() == [0] * 8
    assert batch.logit_rows.tolist() == [0] * 5
    assert not ModelRunner.record_ahead(None, 1)  # type: ignore[arg-type]
