"""The end of an engine: draining, closing, forks of the process; and readers who never come."""

import asyncio
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nudging import LLM, AsyncLLM, Base, EngineClosed, SamplingParams
from tests.support.pairs import PROMPT, assert_pools_are_whole, one, written
from tests.support.simulated import Setup, SimLLM
from tests.support.waiting import PATIENCE, Stopped, give_time, wait_until

LONG = SamplingParams(max_tokens=300, ignore_eos=True)


def test_drain_finishes_what_is_there_and_takes_nothing_new(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
        with ThreadPoolExecutor(1) as elsewhere, Stopped(llm._engine, steps=2) as engine:
            handles = [llm.submit(PROMPT, LONG) for _ in range(4)]
            engine.reached()
            drained = elsewhere.submit(llm.drain, timeout=0.01)
            wait_until(lambda: not llm._thread.loop.commands.empty())
            engine.step_on()
            with pytest.raises(TimeoutError, match="4 requests did not end within 0.01 s; close"):
                drained.result(PATIENCE)
        for use in (llm.submit, llm.generate, lambda prompt: llm.open(prompt).extend()):
            with pytest.raises(EngineClosed, match="takes no more requests"):
                use(PROMPT)
        llm.drain()
        assert [h.result(timeout=0).outputs[0].finish_reason for h in handles] == ["length"] * 4
        assert_pools_are_whole(llm)
    llm.drain()
    with pytest.raises(EngineClosed, match="the engine is closed"):
        llm.submit(PROMPT)


def test_closing_ends_a_drain(tiny_pair: dict[str, Path]) -> None:
    llm = LLM(**tiny_pair, kv_cache_memory="2MiB")
    with Stopped(llm._engine, steps=2) as engine:
        handle = llm.submit(PROMPT, LONG)
        engine.reached()
        drain, close = threading.Thread(target=llm.drain), threading.Thread(target=llm.close)
        drain.start()
        wait_until(lambda: not llm._thread.loop.commands.empty())
        engine.step_on()
        assert llm._thread.loop.is_draining
        close.start()
        wait_until(lambda: llm._thread.loop.is_closing)
    for thread in (drain, close):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert handle.result(timeout=PATIENCE).outputs[0].finish_reason == "abort"


def test_an_async_engine_drains(tiny_pair: dict[str, Path]) -> None:
    async def main() -> None:
        async with AsyncLLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
            handle = llm.submit(PROMPT, LONG)
            await llm.drain()
            assert handle.is_finished

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def in_forked_child(llm: LLM, handle: Any, generation: Any, pipe: Any) -> None:
    """Every way to use an engine, tried in a forked child; sends what each raised."""
    uses = {
        "submit": lambda: llm.submit(PROMPT),
        "generate": lambda: llm.generate(PROMPT),
        "stream": lambda: next(llm.stream(PROMPT)),
        "open": lambda: llm.open(PROMPT),
        "extend": lambda: generation.extend(),
        "logits": lambda: llm.logits("base", [60]),
        "drain": lambda: llm.drain(),
        "result": lambda: handle.result(),
        "iterate": lambda: next(iter(handle)),
        "cancel": lambda: handle.cancel(),
        "close": lambda: llm.close(),
    }
    raised = {}
    for name, use in uses.items():
        try:
            use()
            raised[name] = "nothing"
        except EngineClosed as error:
            raised[name] = str(error)
    pipe.send(raised)
    pipe.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_waiting_for_ever(tiny_pair: dict[str, Path]) -> None:
    context = multiprocessing.get_context("fork")
    with LLM(**tiny_pair, kv_cache_memory="2MiB") as llm, llm.open(PROMPT) as generation:
        handle = llm.submit(PROMPT, LONG)
        ours, theirs = context.Pipe()
        child = context.Process(target=in_forked_child, args=(llm, handle, generation, theirs), daemon=True)
        child.start()
        assert ours.poll(PATIENCE), "the child hangs"
        raised = ours.recv()
        child.join(timeout=PATIENCE)
        assert raised.pop("close") == "nothing"
        for message in raised.values():
            assert "cannot be used in its forked child" in message
            assert "spawn" in message
        assert handle.result(timeout=PATIENCE).outputs[0].finish_reason == "length", "the parent goes on"
        assert one(llm, max_tokens=3).error is None


def close_in_forked_child(llm: LLM, pipe: Any) -> None:
    llm.close()
    pipe.send("closed")
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_closes_an_engine_whose_threads_slept(
    tiny_pair: dict[str, Path], threads: Callable[[int], None], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    threads(3)
    trace = tmp_path / "trace.json"
    with LLM(**tiny_pair, kv_cache_memory="2MiB", trace=str(trace)) as llm:
        assert one(llm, max_tokens=3).error is None
        give_time(1.0)  # until the threads that compute sleep
        ours, theirs = context.Pipe()
        context.Process(target=close_in_forked_child, args=(llm, theirs), daemon=True).start()
        assert ours.poll(PATIENCE), "the child hangs"
        assert one(llm, max_tokens=3).error is None, "the parent goes on"
    events = json.loads(trace.read_text())
    assert [event["id"] for event in events if event["ph"] == "b"] == ["request-0-0", "request-1-0"]


def test_a_reader_who_never_comes_costs_its_text_and_holds_nobody_up(tiny_pair: dict[str, Path]) -> None:
    """The event loop is busy elsewhere while 600 tokens are written: one call waits for it."""

    async def main() -> None:
        async with AsyncLLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
            loop = asyncio.get_running_loop()
            calls = 0
            schedule = loop.call_soon_threadsafe

            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                return schedule(*arguments, **options)

            loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
            unread = [llm.submit(PROMPT, LONG, speculate="off") for _ in range(2)]
            assert llm._llm is not None
            llm._llm.drain()
            assert calls <= 2
            loop.call_soon_threadsafe = schedule  # type: ignore[method-assign]
            for handle in unread:
                deltas = [delta async for delta in handle]
                assert len(deltas) == 1, "what nobody read is one delta"
                assert len(deltas[0].token_ids) == 300

    asyncio.run(asyncio.wait_for(main(), timeout=PATIENCE))


def test_an_ended_request_holds_no_logits(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
        handle = llm.submit(PROMPT, SamplingParams(max_tokens=8, logprobs=2))
        handle.result(timeout=PATIENCE)
        assert not any(s.rows for request in handle._requests for s in request.sequences.values())


def test_two_engines_write_side_by_side(tiny_pair: dict[str, Path]) -> None:
    """Small pools, threads, salts and priorities of their own: neither knows of the other."""
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, n=3, ignore_eos=True)
    prompts = [[60 + i, 61, 62] for i in range(6)]
    with LLM(**tiny_pair, kv_cache_memory="192KiB") as a, LLM(**tiny_pair, kv_cache_memory="8MiB") as b:
        found: dict[str, Any] = {}

        def work(name: str, llm: LLM) -> None:
            found[name] = llm.generate(prompts, params, Base(), priority=len(name))

        threads = [threading.Thread(target=work, args=pair) for pair in (("a", a), ("bb", b))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        texts = [[written(o) for r in found[name] for o in r.outputs] for name in ("a", "bb")]
        assert texts[0] == texts[1]
        a.close()
        assert one(b, max_tokens=3).error is None, "closing one leaves the other"


def test_an_engine_that_breaks_tells_everyone_and_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is served, who streams, who comes at that moment, and who comes later."""
    llm = SimLLM(Setup(blocks=(4000, 4000), max_len=4096), threaded=True)
    armed, reached, breaks = threading.Event(), threading.Event(), threading.Event()
    step = llm._engine.step

    def broken() -> Any:
        if not armed.is_set():
            return step()
        reached.set()
        breaks.wait(PATIENCE)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(llm._engine, "step", broken)
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    handles = [llm.submit([2, 3], params, Base(), "off") for _ in range(3)]
    armed.set()
    assert reached.wait(PATIENCE)
    # A command that the thread does not come to any more.
    late: list[BaseException] = []

    def submit_late() -> None:
        try:
            late.append(llm.submit([2]).result(timeout=PATIENCE).outputs[0].error or AssertionError("it ran"))
        except EngineClosed as error:
            late.append(error)

    latecomer = threading.Thread(target=submit_late)
    latecomer.start()
    wait_until(lambda: not llm._thread.loop.commands.empty())
    breaks.set()
    latecomer.join(PATIENCE)
    message = r"the engine stopped: RuntimeError\('out of luck'\); open a new LLM"
    assert isinstance(late[0], EngineClosed)
    for handle in handles:
        with pytest.raises(EngineClosed, match=message) as caught:
            handle.result(timeout=PATIENCE)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert [delta.finish_reason for delta in handle][-1] == "error", "a stream ends, too"
    with pytest.raises(EngineClosed, match=message):
        llm.submit([2])
    # Nobody is left to be cancelled, and nothing hangs.
    handles[0].cancel()
    llm.close()


def test_a_result_that_does_not_come_in_time_says_how_to_end_it() -> None:
    with SimLLM(Setup(blocks=(4000, 4000), max_len=16000, block_size=8), threaded=True) as llm:
        with Stopped(llm._engine, steps=2):
            handle = llm.submit([2], SamplingParams(max_tokens=15000, ignore_eos=True), Base(), "off")
            with pytest.raises(TimeoutError, match=r"did not finish within 0.01 s; cancel\(\) ends it"):
                handle.result(timeout=0.01)
            handle.cancel()
        assert handle.result(timeout=PATIENCE).outputs[0].finish_reason == "abort"


def test_a_stream_of_three_texts_ends_each_once() -> None:
    with SimLLM(Setup(), threaded=True) as llm:
        params = SamplingParams(max_tokens=9, n=3, temperature=1.0, seed=2, ignore_eos=True)
        whole = llm.submit([2, 3], params, Base()).result(timeout=PATIENCE).outputs
        deltas = list(llm.submit([2, 3], params, Base()))
        for i, output in enumerate(whole):
            mine = [delta for delta in deltas if delta.index == i]
            assert [token for delta in mine for token in delta.token_ids] == list(output.token_ids)
            assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + ["length"]


def test_a_close_beside_many_callers_leaves_none_of_them_waiting() -> None:
    """Whoever reads prompts, submits, waits or asks for figures at that moment."""
    for moment in range(12):
        llm = SimLLM(Setup(blocks=(4000, 4000), max_len=4096), threaded=True)
        params = SamplingParams(max_tokens=3000, ignore_eos=True)
        found: list[Any] = []

        def use(llm: SimLLM = llm, params: SamplingParams = params, found: list[Any] = found) -> None:
            for ask in (
                lambda: llm.generate([[2, 3]] * 8, params, Base(), "off"),
                lambda: list(llm.stream([2, 3], params, Base(), "off")),
                lambda: llm.score([2, 3], [4] * 50, Base()),
                lambda: llm._thread.call(lambda: None),
                lambda: llm.open([2, 3], Base()).extend(params),
                lambda: llm.drain(timeout=60),
                llm.stats,
            ):
                try:
                    found.append(ask())
                except EngineClosed as error:
                    found.append(error)
                except BaseException as error:
                    found.append(error)
                    raise

        users = [threading.Thread(target=use) for _ in range(3)]
        for user in users:
            user.start()
        while llm._thread.loop._turns < 5 * moment:
            threading.Event().wait(0.0005)
        llm.close()
        for user in users:
            user.join(60)
            assert not user.is_alive(), "somebody still waits"
        assert len(found) == 21


def test_two_threads_read_one_handle_each_the_whole_of_it() -> None:
    with SimLLM(Setup(blocks=(4000, 4000), max_len=4096), threaded=True) as llm:
        handle = llm.submit([2, 3], SamplingParams(max_tokens=400, ignore_eos=True), Base(), "off")
        read: list[list[int]] = [[], []]
        readers = [
            threading.Thread(target=lambda ids=ids: ids.extend(t for d in handle for t in d.token_ids))
            for ids in read
        ]
        for reader in readers:
            reader.start()
        whole = list(handle.result(timeout=60).outputs[0].token_ids)
        for reader in readers:
            reader.join(60)
        assert read == [whole, whole]
        assert len(whole) == 400


def test_what_is_cancelled_before_it_arrives_never_runs() -> None:
    with SimLLM(Setup(), threaded=True) as llm:
        gate = threading.Event()
        asked = threading.Thread(target=llm._thread.call, args=(lambda: gate.wait(60),))
        asked.start()
        handle = llm.submit([2, 3], LONG, Base(), "off")
        handle.cancel()
        gate.set()
        output = handle.result(timeout=60).outputs[0]
        assert (output.finish_reason, output.token_ids) == ("abort", ())
        asked.join(60)
