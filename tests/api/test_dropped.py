"""What nobody closed: engines, texts and streams that are dropped, and processes that end."""

import asyncio
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from nudging import LLM, Base, SamplingParams
from nudging.api.async_handle import AsyncHandle, AsyncStream
from tests.support.simulated import Setup, SimLLM

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
ROOMY = Setup(blocks=(9000, 9000), max_len=30000)
ENDLESS = SamplingParams(max_tokens=20000, ignore_eos=True)
# Guards a hang; a busy machine takes as long as it needs.
PATIENCE = 120


def wait_until(happened: Callable[[], bool]) -> None:
    for _ in range(PATIENCE * 100):
        if happened():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never happened")


def assert_ends(held: list[Any]) -> None:
    """Of an LLM, the first of those who are held: dropped with them, it says so, its thread ends and its
    memory is given back.
    """
    thread, engine = held[0]._thread._thread, held[0]._engine
    kept = [weakref.ref(one) for one in (held[0], engine, *engine.runners.values())]
    del engine
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        held.clear()
        gc.collect()
        wait_until(lambda: not thread.is_alive())
    assert [str(one.message).split(";")[0] for one in told if one.category is ResourceWarning] == [
        "an LLM was dropped without close()"
    ]
    gc.collect()
    assert [one() for one in kept] == [None] * len(kept)


def test_an_engine_that_nobody_holds_ends_and_says_so() -> None:
    held = [SimLLM(ROOMY, threaded=True)]
    held[0].generate([[2, 3]], PARAMS, Base())
    assert_ends(held)


def test_the_pocket_pair_gives_its_memory_back() -> None:
    held = [LLM.pocket(threads=1)]
    held[0].generate("Once", SamplingParams(max_tokens=2))
    assert_ends(held)


def test_an_engine_ends_though_its_listeners_hold_it_and_its_requests_run() -> None:
    def watch(llm: SimLLM) -> Any:
        llm.on_end(lambda request: print(llm.stats()))
        handle = llm.submit([2, 3], ENDLESS, Base(), "off")
        handle.add_listener(lambda: None)
        next(iter(handle))
        return handle

    held: list[Any] = [SimLLM(ROOMY, threaded=True)]
    held.append(watch(held[0]))
    assert_ends(held)


def test_who_holds_a_handle_or_a_text_holds_the_engine() -> None:
    def open_both() -> tuple[Any, Any]:
        llm = SimLLM(Setup(), threaded=True)
        return llm.submit([2, 3], PARAMS, Base(), "off"), llm.open([2, 3], Base())

    handle, text = open_both()
    gc.collect()
    assert len(handle.result(timeout=PATIENCE).outputs[0].token_ids) == 6
    del handle
    gc.collect()
    assert len(text.extend(PARAMS).token_ids) == 6
    held: list[Any] = [text]
    del text
    assert_ends(held)


def test_a_closed_engine_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = SimLLM(Setup(), threaded=True)
        llm.close()
        del llm
        gc.collect()


def idle(llm: SimLLM) -> bool:
    stats = llm.stats()
    return not (stats.running or stats.waiting or any(stats.kv_cache_usage.values()))


def test_forgotten_texts_give_their_cache_back() -> None:
    setup = Setup(blocks=(400, 400), prefix_caching=False)
    with SimLLM(setup, threaded=True) as llm:
        for _ in range(20):
            text = llm.open([2] * 20, Base())
            text.extend(PARAMS)
            text.fork().extend(PARAMS)
        assert llm.stats().kv_cache_usage["base"] > 0
        del text
        gc.collect()
        wait_until(lambda: idle(llm))
        assert not llm._engine.scheduler._kept


def test_nothing_is_left_of_an_engine_that_was_closed() -> None:
    """C++ holds functions of Python's, where the garbage collector does not look."""
    with SimLLM(ROOMY, threaded=True) as llm:
        llm.generate([[2, 3]], PARAMS, Base(), "off")
        engine = llm._engine
        parts = [engine, engine.fast_path, *(runner.pool for runner in engine.runners.values())]
        left = [weakref.ref(part) for part in parts]
    del llm, engine, parts
    gc.collect()
    assert [part() for part in left if part() is not None] == []


def test_a_text_forgotten_while_it_is_written_is_written_no_further() -> None:
    with SimLLM(ROOMY, threaded=True) as llm:
        text = llm.open([2, 3], Base())
        handle = text.begin(ENDLESS)
        next(iter(handle))
        del text
        gc.collect()
        assert handle.result(timeout=PATIENCE).outputs[0].finish_reason == "abort"
        wait_until(lambda: idle(llm))


@pytest.mark.parametrize("how", ["unread", "half-way", "closed", "left"])
def test_a_stream_that_is_dropped_cancels_its_request(how: str) -> None:
    with SimLLM(ROOMY, threaded=True) as llm:
        stream = llm.stream([2, 3], ENDLESS, Base(), "off")
        if how != "unread":
            next(stream)
        if how == "closed":
            stream.close()
            assert list(stream) == []
        if how == "left":
            with pytest.raises(ZeroDivisionError), stream:
                _ = 1 // 0
        if how in ("unread", "half-way"):
            del stream
            gc.collect()
        # An engine whose thread has not come to the request yet is idle, too.
        wait_until(lambda: llm.stats().totals.finished == {"abort": 1} and idle(llm))


@pytest.mark.parametrize("reads", [0, 1])
def test_an_async_stream_that_is_dropped_without_aclose_cancels_its_request(reads: int) -> None:
    with SimLLM(ROOMY, threaded=True) as llm:

        async def main() -> None:
            stream = AsyncStream(llm.submit([2, 3], ENDLESS, Base(), "off"))
            for _ in range(reads):
                await anext(stream)
            del stream
            gc.collect()
            while not (llm.stats().totals.finished == {"abort": 1} and idle(llm)):
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_loop_that_ends_over_its_requests_ends_them() -> None:
    with SimLLM(ROOMY, threaded=True) as llm:

        async def main() -> AsyncHandle:
            handle = AsyncHandle(llm.submit([2, 3], ENDLESS, Base(), "off"))
            await anext(aiter(handle))
            return handle

        handle = asyncio.run(main())
        wait_until(lambda: handle.is_finished)
        assert handle._handle.result().outputs[0].finish_reason == "abort"


def test_stats_beside_a_close_raise_nothing() -> None:
    """Whoever reads while the runners go away."""
    for _ in range(30):
        llm = SimLLM(Setup(), threaded=True)
        is_over, found = threading.Event(), []

        def read(llm: SimLLM = llm, is_over: threading.Event = is_over, found: list[Any] = found) -> None:
            try:
                while not is_over.is_set():
                    llm.stats()
            except BaseException as error:
                found.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        llm.close()
        is_over.set()
        reader.join(PATIENCE)
        assert found == []


BEGIN = """
import asyncio, atexit, os, signal, sys, threading
from nudging import LLM, AsyncLLM, EngineClosed, SamplingParams
# A process that was started in the background ignores interrupts, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
llm = LLM.pocket(threads=1, max_len=4096)
LONG = SamplingParams(max_tokens=3000, ignore_eos=True)
handles = llm.submit_all(["Once upon", "There was"], LONG, speculate="off")
next(iter(handles[0]))
"""
FORK = """
pid = os.fork()
if pid == 0:
    sys.exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
FORKED_STREAM = """
stream = llm.stream("x", LONG)
next(stream)
pid = os.fork()
if pid == 0:
    try:
        for _ in stream:
            pass
    except EngineClosed:
        sys.exit(7)
    sys.exit(8)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
ENDS = {
    "end": ("", 0),
    "stream": ("for _ in llm.stream('x', LONG): break", 0),
    "status": ("sys.exit(3)", 3),
    "error": ("raise RuntimeError('mine')", 1),
    "interrupt": ("raise KeyboardInterrupt", -2),
    "signal": ("os.kill(os.getpid(), signal.SIGINT); handles[0].result()", -2),
    "thread": ("threading.Thread(target=lambda: llm.submit('x').result()).start(); sys.exit(4)", 4),
    "atexit": ("atexit.register(lambda: print(len(llm.generate('x')), flush=True)); sys.exit(5)", 5),
    "dropped": ("handles[0].cancel(); del llm, handles", 0),
    "dropped in a stream": ("del llm, handles\nfor _ in LLM.pocket(threads=1).stream('x', LONG): break", 0),
    "forked stream": (FORKED_STREAM, 7),
    "kept": ("sys.modules['kept'] = llm; del llm; sys.exit(6)", 6),
    "fork": (FORK, 7),
}
# Each takes as long as loading torch does.
QUICK = ("stream", "status", "signal", "fork", "dropped in a stream", "forked stream")


@pytest.mark.parametrize(
    "how",
    [how if how in QUICK else pytest.param(how, marks=pytest.mark.slow) for how in ENDS],
)
def test_a_process_that_ends_without_close_has_its_own_status(how: str) -> None:
    """The engine's thread is not stopped in the midst of C++."""
    code, status = ENDS[how]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == status, done.stderr
    assert "terminate called" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if status in (0, 3, 4, 5, 6, 7):
        assert done.stderr == ""
    if how == "atexit":
        assert done.stdout == "1\n"
