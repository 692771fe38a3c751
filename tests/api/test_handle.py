"""A job in its caller's hands, and the thread behind it: what is told when, and to whom."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nudging import Base, EngineClosed, SamplingParams
from nudging.api.handle import Handle
from nudging.api.outputs import Segment
from nudging.core.engine_thread import EngineThread
from nudging.core.request import Piece, Request
from tests.api.test_output import ended
from tests.support.simulated import Setup, SimLLM
from tests.support.simulation import World
from tests.support.waiting import PATIENCE, Stopped, give_time, wait_until

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def watched(authors: str, *, tail: str = "", is_finished: bool = True) -> tuple[Handle, Request]:
    """A handle of one request, as the engine left it."""
    job = ended(authors)
    job.tail = tail
    handle = Handle("h", [job], SimLLM(Setup())._thread)
    if not is_finished:
        job.finish_reason = None
    handle.mailbox.notify(job)
    return handle, job


def test_a_delta_is_what_came_since_and_the_last_one_says_how_it_ended() -> None:
    handle, job = watched("bgg", is_finished=False)
    delta = handle.take(0, 1)
    assert delta is not None
    assert (delta.token_ids, delta.authors, delta.finish_reason) == ((3, 4), ("guide", "guide"), None)
    assert handle.take(0, 3) is None
    assert not handle.is_finished
    job.finish("stop")
    assert handle.take(0, 3) is None, "the engine has not told it yet"
    handle.mailbox.notify(job)
    last = handle.take(0, 3)
    assert last is not None
    assert (last.token_ids, last.finish_reason, last.segments) == ((), "stop", ())
    assert handle.is_finished


def test_what_becomes_final_at_the_end_belongs_to_who_wrote_last() -> None:
    for authors, seen, segment in (
        ("bg", 2, Segment("guide", "!", ())),
        ("bg", 1, Segment("guide", "!", (3,))),
        ("gb", 2, Segment("base", "!", ())),
        ("", 0, Segment("base", "!", ())),
    ):
        delta = watched(authors, tail="!")[0].take(0, seen)
        assert delta is not None
        assert (delta.text, delta.segments) == ("!", (segment,))
    held = watched("bg", tail="!", is_finished=False)[0].take(0, 1)
    assert held is not None
    assert held.text == "", "it is not final before the end"


def test_listeners_are_told_at_once_and_of_every_move() -> None:
    handle, job = watched("b", is_finished=False)
    told: list[bool] = []
    handle.add_listener(lambda: told.append(handle.is_finished))
    job.pieces.append(Piece(5, "base", ""))
    handle.mailbox.notify(job)
    job.finish("stop")
    handle.mailbox.notify(job)
    assert told == [False, False, True]


def test_a_stream_of_two_goes_on_where_one_of_them_waits() -> None:
    """A budget of one token goes to the first text until its end."""
    world = World(Setup(max_batch_tokens=1))
    job = world.submit([2], SamplingParams(max_tokens=3, n=2, ignore_eos=True), Base(), "off")
    stream, seen = iter(job.handle), []
    assert job.handle.num_outputs == 2
    for _ in range(3):
        world.turn()
        seen.append(next(stream))
        assert not job.handle.is_finished
    assert [delta.index for delta in seen] == [0, 0, 0]
    world.drain()
    rest = list(stream)
    assert [(delta.index, len(delta.token_ids), delta.finish_reason) for delta in rest] == [(1, 3, "length")]
    outputs = job.handle.result(timeout=0).outputs
    assert [output.index for output in outputs] == [0, 1]


def test_a_stream_waits_for_no_text_in_order() -> None:
    jobs = [ended(""), ended("bg")]
    for job in jobs:
        job.finish_reason = None
    handle = Handle("h", jobs, SimLLM(Setup())._thread)
    delta = next(iter(handle))
    assert (delta.index, delta.token_ids) == (1, (2, 3))


def test_another_process_is_told_instead_of_waiting() -> None:
    """As in a forked child, which has another process id and no thread."""
    llm = SimLLM(Setup())
    text = llm.open([2, 3], Base())
    handle = llm.submit([2, 3], PARAMS, Base())
    ours = llm._thread._process
    llm._thread._process = ours + 1
    uses: list[Any] = [
        lambda: llm.submit([2]),
        lambda: next(iter(handle)),
        text.extend,
        handle.result,
        handle.cancel,
        llm.drain,
        llm._thread.check_open,
    ]
    for use in uses:
        with pytest.raises(EngineClosed, match=f"was opened in process {ours + 1} and cannot be used"):
            use()
    EngineThread.close(llm._thread)
    assert not llm._thread.loop.is_closing, "there is nothing to end"


def test_what_runs_on_the_engines_thread_may_call_it_and_close_it() -> None:
    """A listener of ends is called there: waiting for that thread would wait for ever."""
    llm = SimLLM(Setup(), threaded=True)
    found: list[Any] = []
    both_are_there = threading.Event()

    def at_end(request: Request) -> None:
        assert both_are_there.wait(PATIENCE)
        found.append(llm._thread.call(threading.current_thread))
        llm.close()
        found.append("closed")

    llm.on_end(at_end)
    first, other = (llm.submit([2, token], PARAMS, Base(), "off") for token in (3, 4))
    both_are_there.set()
    assert first.result(timeout=PATIENCE).outputs[0].finish_reason == "length"
    assert other.result(timeout=PATIENCE).outputs[0].finish_reason in ("length", "abort")
    llm._thread._thread.join(PATIENCE)
    assert found[:2] == [llm._thread._thread, "closed"]


def test_an_error_of_a_call_is_the_callers_and_the_engine_goes_on() -> None:
    with SimLLM(Setup(), threaded=True) as llm:
        with pytest.raises(ZeroDivisionError):
            llm._thread.call(lambda: 1 // 0)
        assert llm._thread.call(lambda: 7) == 7
        assert llm.submit([2], PARAMS, Base()).result(timeout=PATIENCE).outputs[0].finish_reason == "length"


def test_a_drained_engine_has_written_everything_and_takes_nothing() -> None:
    long = SamplingParams(max_tokens=300, ignore_eos=True)
    llm = SimLLM(Setup(blocks=(400, 400), max_len=4096), threaded=True)
    with ThreadPoolExecutor(1) as elsewhere, Stopped(llm._engine, steps=2) as engine:
        handles = [llm.submit([2, token], long, Base(), "off") for token in (3, 4, 5)]
        engine.reached()
        drained = elsewhere.submit(llm.drain, timeout=0.0)
        wait_until(lambda: not llm._thread.loop.commands.empty())
        engine.step_on()
        with pytest.raises(TimeoutError, match=r"3 requests did not end within 0.0 s; close\(\) ends them"):
            drained.result(PATIENCE)
        with pytest.raises(EngineClosed, match=r"drain\(\) was called: the engine takes no more requests"):
            llm.submit([2])
        handles[0].cancel()
    llm.drain(timeout=PATIENCE)
    outputs = [handle.result(timeout=0).outputs[0] for handle in handles]
    assert [output.finish_reason for output in outputs] == ["abort", "length", "length"]
    llm.close()
    llm.drain(timeout=0.0)
    with pytest.raises(EngineClosed, match="the engine is closed; open a new LLM"):
        llm.submit([2])
    handles[1].cancel()
    llm.close()


def test_closing_waits_until_everybody_was_told() -> None:
    llm = SimLLM(Setup(blocks=(400, 400), max_len=4096), threaded=True)
    told: list[str | None] = []

    def at_end(request: Request) -> None:
        give_time()
        told.append(request.finish_reason)

    llm.on_end(at_end)
    params = SamplingParams(max_tokens=900, ignore_eos=True)
    with ThreadPoolExecutor(1) as elsewhere, Stopped(llm._engine, steps=2) as engine:
        handles = [llm.submit([2, i], params, Base()) for i in (3, 4)]
        engine.reached()
        closed = elsewhere.submit(llm.close)
        wait_until(lambda: llm._thread.loop.is_closing)
    closed.result(PATIENCE)
    assert told == ["abort"] * 2
    assert all(handle.is_finished for handle in handles)


def test_what_a_close_overtakes_ends_as_if_it_had_run() -> None:
    world = World(Setup())
    job = world.submit([2, 3], PARAMS, Base())
    world.close_server()
    output = job.handle.result(timeout=0).outputs[0]
    assert (output.finish_reason, output.error, output.token_ids) == ("abort", None, ())


def test_who_listens_to_what_is_over_is_told_once() -> None:
    handle, _ = watched("b")
    told: list[bool] = []
    handle.add_listener(lambda: told.append(handle.is_finished))
    handle.mailbox.notify(handle._requests[0])
    assert told == [True]
