"""An open text has one request at a time, whatever interrupts the calls on it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nudging import AsyncLLM, BadRequest, Base, EngineClosed, SamplingParams
from nudging.api.async_generation import AsyncGeneration
from nudging.api.async_handle import called
from nudging.api.generation import Generation
from nudging.errors import DeadlineExceeded
from tests.api.test_dropped import idle, wait_until
from tests.support.simulated import Setup, SimLLM

ROOMY = Setup(blocks=(9000, 9000), max_len=30000)
ENDLESS = SamplingParams(max_tokens=20000, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
# Guards a hang; a busy machine takes as long as it needs.
PATIENCE = 120


def run(use: Callable[[SimLLM], Awaitable[None]]) -> None:
    with SimLLM(ROOMY, threaded=True) as llm:
        asyncio.run(asyncio.wait_for(use(llm), PATIENCE))
        wait_until(lambda: idle(llm))


def opened(llm: SimLLM) -> AsyncGeneration:
    return AsyncGeneration(llm.open([2, 3], Base()))


async def begun(llm: SimLLM) -> None:
    """Something is being written."""
    while not llm.stats().running:
        await asyncio.sleep(0.001)


def straight(llm: SimLLM) -> tuple[int, ...]:
    return llm.generate([[2, 3]], SHORT, Base(), "off")[0].outputs[0].token_ids


def test_an_extension_that_is_cancelled_ends_and_the_next_one_writes_what_it_would_have() -> None:
    async def use(llm: SimLLM) -> None:
        async with opened(llm) as text:
            for _ in range(5):
                task = asyncio.create_task(text.extend(ENDLESS))
                await begun(llm)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert text.token_ids == [], "what it had written is dropped"
                await text.rewind(0)
                assert (await text.extend(SHORT)).token_ids == straight(llm)
                await text.rewind(0)

    run(use)


@pytest.mark.parametrize("call", ["extend", "score", "fork", "write", "rewind", "close"])
def test_every_call_after_a_cancelled_one_finds_a_quiet_text(call: str) -> None:
    calls: dict[str, Callable[[AsyncGeneration], Awaitable[Any]]] = {
        "extend": lambda text: text.extend(SHORT),
        "score": lambda text: text.score([4, 5]),
        "fork": lambda text: text.fork(),
        "write": lambda text: text.extend(text=[7]),
        "rewind": lambda text: text.rewind(1),
        "close": lambda text: text.close(),
    }

    async def use(llm: SimLLM) -> None:
        found = []
        for is_cancelled in (False, True):
            text = opened(llm)
            await text.extend(text=[6, 8])
            if is_cancelled:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(text.extend(ENDLESS), 0.01)
            said = await calls[call](text)
            if isinstance(said, AsyncGeneration):
                assert (await said.extend(SHORT)).token_ids
                await said.close()
            found.append((text.token_ids, text.authors))
            if call != "close":
                assert (await text.extend(SHORT)).finish_reason == "length"
                found[-1] += (text.token_ids,)
            await text.close()
        assert found[0] == found[1]

    run(use)


def test_several_tasks_on_one_text_come_one_after_the_other() -> None:
    async def use(llm: SimLLM) -> None:
        async with opened(llm) as text:
            tasks = [asyncio.create_task(text.extend(SHORT)) for _ in range(4)]
            cancelled = asyncio.create_task(text.extend(ENDLESS))
            await asyncio.gather(*tasks)
            await begun(llm)
            last = asyncio.create_task(text.extend(SHORT))
            cancelled.cancel()
            await last
            whole = SamplingParams(max_tokens=25, ignore_eos=True)
            expected = llm.generate([[2, 3]], whole, Base(), "off")[0].outputs[0].token_ids
            assert tuple(text.token_ids) == expected

    run(use)


def test_the_pocket_pair_goes_on_after_a_timeout() -> None:
    async def main() -> None:
        async with AsyncLLM.pocket(threads=1) as llm:
            text = llm.open("The river runs", Base())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(text.extend(SamplingParams(max_tokens=450, ignore_eos=True)), 0.01)
            await text.rewind(0)
            output = await text.extend(SHORT)
            assert output.token_ids == tuple(text.token_ids)
            [whole] = await llm.generate("The river runs", SHORT, Base())
            assert output.token_ids == whole.outputs[0].token_ids
            await text.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_call_for_the_engines_thread_that_is_cancelled_is_not_run() -> None:
    """As `logits` asks for rows: behind a step that takes long."""

    async def use(llm: SimLLM) -> None:
        gate, ran = threading.Event(), []
        first = asyncio.create_task(called(llm._thread, lambda: gate.wait(PATIENCE)))
        second = asyncio.create_task(called(llm._thread, lambda: ran.append(1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        assert await first
        assert await called(llm._thread, lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await called(llm._thread, lambda: 1 // 0)
        assert ran == []

    run(use)


@pytest.mark.parametrize("how", ["generate", "score", "stream", "extend"])
def test_a_cancelled_call_of_the_async_engine_runs_on_nowhere(how: str) -> None:
    async def use(llm: SimLLM) -> None:
        engine = AsyncLLM.pocket()
        engine._llm = llm
        text = engine.open([2, 3], Base())

        async def read() -> None:
            async for _ in engine.stream([2, 3], ENDLESS, Base(), "off"):
                pass

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "generate": lambda: engine.generate([[2, 3]] * 3, ENDLESS, Base(), "off"),
            "score": lambda: engine.score([2, 3], [4] * 20000, Base()),
            "stream": read,
            "extend": lambda: text.extend(ENDLESS),
        }
        task = asyncio.ensure_future(calls[how]())
        await begun(llm)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await text.close()
        while not idle(llm):
            await asyncio.sleep(0.001)

    run(use)


def writing(llm: SimLLM) -> tuple[Generation, threading.Thread, list[Any]]:
    """A text that another thread extends."""
    text, found = llm.open([2, 3], Base()), []

    def extend() -> None:
        try:
            found.append(text.extend(ENDLESS))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=extend)
    thread.start()
    wait_until(lambda: llm.stats().running > 0)
    return text, thread, found


def test_another_thread_is_told_that_the_text_is_being_written() -> None:
    with SimLLM(ROOMY, threaded=True) as llm:
        text, thread, found = writing(llm)
        uses: list[Callable[[], Any]] = [
            lambda: text.extend(SHORT),
            lambda: text.score([4]),
            lambda: text.extend(text=[4]),
            lambda: text.rewind(0),
            text.fork,
        ]
        for use in uses:
            with pytest.raises(BadRequest, match="another call of this generation is under way"):
                use()
        text.close()
        thread.join(PATIENCE)
        assert found[0].finish_reason == "abort", "closing it ends what is under way"
        wait_until(lambda: idle(llm))


def test_a_text_that_a_listener_closes_before_its_request_arrives_is_closed() -> None:
    """On the engine's thread a close comes before what is still queued."""
    with SimLLM(ROOMY, threaded=True) as llm:
        text, found = llm.open([2, 3], Base()), []

        def listen(request: Any) -> None:
            found.append(text.begin(SHORT))
            text.close()

        llm.on_end(lambda request: found or listen(request))
        llm.submit([2, 3], SHORT, Base(), "off").result(timeout=PATIENCE)
        wait_until(lambda: bool(found))
        with pytest.raises(BadRequest, match="was closed"):
            raise found[0].result(timeout=PATIENCE).outputs[0].error or AssertionError("it ran")
        wait_until(lambda: idle(llm))


def test_closing_the_engine_ends_who_extends() -> None:
    llm = SimLLM(ROOMY, threaded=True)
    text, thread, found = writing(llm)
    llm.close()
    thread.join(PATIENCE)
    assert found[0].finish_reason == "abort"
    assert tuple(text.token_ids) == found[0].token_ids
    with pytest.raises(EngineClosed):
        text.extend(SHORT)
    text.close()


def test_a_call_that_fails_leaves_the_text_as_it_was() -> None:
    with SimLLM(ROOMY, threaded=True) as llm, llm.open([2, 3], Base(), timeout=5.0) as text:
        text.extend(text=[6, 8])
        with pytest.raises(DeadlineExceeded):
            text.extend(ENDLESS)
        assert (text.token_ids, text.authors) == ([6, 8], ["caller"] * 2)
        assert len(text.extend(SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2


def test_a_text_that_does_not_fit_is_refused_and_can_go_on_shorter() -> None:
    with SimLLM(Setup(blocks=(20, 20)), threaded=True) as llm, llm.open([2, 3], Base()) as text:
        with pytest.raises(BadRequest, match="the request may need"):
            text.extend(SamplingParams(max_tokens=200, ignore_eos=True))
        assert len(text.extend(SHORT).token_ids) == 5


def test_a_drained_engine_refuses_an_extension_and_closes_its_text() -> None:
    with SimLLM(ROOMY, threaded=True) as llm:
        text = llm.open([2, 3], Base())
        text.extend(SHORT)
        llm.drain()
        with pytest.raises(EngineClosed, match="takes no more requests"):
            text.extend(SHORT)
        text.close()
        assert idle(llm)
