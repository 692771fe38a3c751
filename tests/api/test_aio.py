"""`AsyncLLM` gives what `LLM` gives, wakes its loop for every change, and lets go of what nobody awaits."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nudging.api.jobs
from nudging import LLM, AsyncLLM, BadRequest, EngineClosed, Nudging, SamplingParams
from nudging.api.async_llm import results
from tests.support.waiting import PATIENCE, Stopped, wait_in_loop

Pair = dict[str, Path]

PROMPTS = ["Hello", "Where is", "12 - 5 =", "Où"]
LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=1.0, seed=3)


@asynccontextmanager
async def opened(pair: Pair) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(**pair, kv_cache_memory="8MiB") as llm:
        yield llm


def run(pair: Pair, use: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """`use` with an opened engine; a hang fails here and not in CI."""

    async def main() -> None:
        async with opened(pair) as llm:
            await asyncio.wait_for(use(llm), timeout=PATIENCE)

    asyncio.run(main())


async def aborted(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing to do."""
    assert llm._llm is not None
    thread, scheduler = llm._llm._thread, llm._llm._engine.scheduler

    while await asyncio.to_thread(thread.call, lambda: bool(scheduler.running or scheduler.waiting)):
        pass


def stopped(llm: AsyncLLM, steps: int = 0) -> Stopped:
    assert llm._llm is not None
    return Stopped(llm._llm._engine, steps)


def test_an_open_generation_is_that_of_the_plain_llm(tiny_pair: Pair, tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=4, ignore_eos=True)

    async def use(llm: AsyncLLM) -> None:
        with tiny_llm.open(PROMPTS[0]) as plain:
            async with llm.open(PROMPTS[0]) as generation:
                for _ in range(2):
                    assert (await generation.extend(params)).token_ids == plain.extend(params).token_ids
                async with await generation.fork() as fork:
                    await fork.rewind(3)
                    assert fork.token_ids == plain.token_ids[:3]
                assert await generation.score(" left") == plain.score(" left")
                assert generation.text == plain.text
                assert generation.authors == plain.authors

    run(tiny_pair, use)


def test_results_are_those_of_the_plain_llm(tiny_pair: Pair, tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=5, n=2)
    policy = Nudging(granularity="token")

    async def use(llm: AsyncLLM) -> None:
        for ours, theirs in (
            (await llm.generate(PROMPTS, params, policy), tiny_llm.generate(PROMPTS, params, policy)),
            (
                await llm.chat([{"role": "user", "content": "Hi"}], params),
                tiny_llm.chat([{"role": "user", "content": "Hi"}], params),
            ),
        ):
            written = [[(o.text, o.token_ids, o.authors) for o in r.outputs] for r in ours]
            assert written == [[(o.text, o.token_ids, o.authors) for o in r.outputs] for r in theirs]
        assert await llm.score("Hello", " there") == tiny_llm.score("Hello", " there")
        np.testing.assert_array_equal(await llm.logits("base", [5, 6]), tiny_llm.logits("base", [5, 6]))

    run(tiny_pair, use)


def test_a_stream_is_the_text_in_parts_by_author(tiny_pair: Pair, tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    expected = tiny_llm.generate("Hello", params, Nudging(granularity="token"))[0].outputs[0]

    async def use(llm: AsyncLLM) -> None:
        deltas = [delta async for delta in llm.stream("Hello", params, Nudging(granularity="token"))]
        assert "".join(delta.text for delta in deltas) == expected.text
        assert tuple(token for delta in deltas for token in delta.token_ids) == expected.token_ids
        parts = [part for delta in deltas for part in delta.segments]
        assert "".join(part.text for part in parts) == expected.text
        authors = tuple(part.author for part in parts for _ in part.token_ids)
        assert authors == expected.authors
        assert [delta.finish_reason for delta in deltas][-1] == expected.finish_reason

    run(tiny_pair, use)


def test_the_event_loop_goes_on_while_texts_are_written(tiny_pair: Pair) -> None:
    async def use(llm: AsyncLLM) -> None:
        with stopped(llm, steps=5) as engine:
            generating = asyncio.create_task(llm.generate(PROMPTS, replace(LONG, max_tokens=100)))
            # In the middle of a step the loop comes to this and to what else there is to do.
            await asyncio.to_thread(engine.reached)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not generating.done()
        assert all(len(result.outputs[0].token_ids) == 100 for result in await generating)

    run(tiny_pair, use)


def test_no_thread_is_started_for_a_request(tiny_pair: Pair) -> None:
    async def use(llm: AsyncLLM) -> None:
        with stopped(llm, steps=5) as engine:
            before = threading.active_count()
            handles = [llm.submit(prompt, LONG) for prompt in PROMPTS]
            waiting = [asyncio.create_task(handle.result()) for handle in handles]
            await asyncio.sleep(0)
            engine.reached()
            assert threading.active_count() == before
            for handle in handles:
                handle.cancel()
        ended = await asyncio.gather(*waiting)
        assert [result.outputs[0].finish_reason for result in ended] == ["abort"] * len(PROMPTS)

    run(tiny_pair, use)


def test_submitting_does_not_wait_for_a_step(tiny_pair: Pair) -> None:
    """A step of a large model may take long; the event loop must not stand still for it."""

    async def use(llm: AsyncLLM) -> None:
        with stopped(llm) as engine:
            first = llm.submit("Hello", SamplingParams(max_tokens=2))
            engine.reached()
            handle = llm.submit("Hello", SamplingParams(max_tokens=2))
            assert not handle.is_finished
        for one in (first, handle):
            assert len((await one.result()).outputs[0].token_ids) <= 2

    run(tiny_pair, use)


@pytest.mark.parametrize("kind", ["generate", "result", "stream"])
def test_a_cancelled_task_cancels_its_request(tiny_pair: Pair, kind: str) -> None:
    async def read(llm: AsyncLLM) -> None:
        async for _ in llm.stream("Hello", LONG):
            pass

    async def use(llm: AsyncLLM) -> None:
        work = {
            "generate": lambda: llm.generate(PROMPTS, LONG),
            "result": lambda: llm.submit("Hello", LONG).result(),
            "stream": lambda: read(llm),
        }[kind]
        with stopped(llm, steps=2) as engine:
            task = asyncio.ensure_future(work())
            await asyncio.to_thread(engine.reached)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await aborted(llm)

    run(tiny_pair, use)


def test_leaving_a_stream_early_cancels_its_request(tiny_pair: Pair) -> None:
    async def use(llm: AsyncLLM) -> None:
        async for _ in llm.stream("Hello", LONG):
            break
        await aborted(llm)

    run(tiny_pair, use)


def test_several_tasks_may_await_one_handle(tiny_pair: Pair) -> None:
    async def use(llm: AsyncLLM) -> None:
        handle = llm.submit("Hello", SamplingParams(max_tokens=30, seed=0))
        texts = [r.outputs[0].text for r in await asyncio.gather(*(handle.result() for _ in range(5)))]
        assert len(set(texts)) == 1

    run(tiny_pair, use)


def test_a_bad_request_is_raised_before_anything_runs(tiny_pair: Pair) -> None:
    async def use(llm: AsyncLLM) -> None:
        with pytest.raises(BadRequest, match="empty"):
            await llm.generate(["Hello", ""], LONG)
        await aborted(llm)

    run(tiny_pair, use)


def test_before_loading_and_after_closing_every_method_says_so(tiny_pair: Pair) -> None:
    async def main() -> None:
        unloaded = AsyncLLM(**tiny_pair)
        with pytest.raises(EngineClosed, match="not loaded"):
            unloaded.submit("Hello")
        llm = await AsyncLLM.create(**tiny_pair, kv_cache_memory="8MiB")
        await llm.close()
        await llm.close()
        with pytest.raises(EngineClosed):
            llm.submit("Hello")
        with pytest.raises(EngineClosed):
            await llm.logits("base", [5])

    asyncio.run(main())


def test_closing_ends_what_runs_with_abort(tiny_pair: Pair) -> None:
    async def main() -> None:
        async with opened(tiny_pair) as llm:
            handle = llm.submit("Hello", LONG)
        assert (await handle.result()).outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_an_event_loop_that_ends_first_does_no_harm(tiny_pair: Pair) -> None:
    """The engine goes on when the loop that submitted is closed over a running request."""

    async def leave() -> AsyncLLM:
        llm = await AsyncLLM.create(**tiny_pair, kv_cache_memory="8MiB")
        llm.submit("Hello", LONG)
        return llm

    abandoned = asyncio.run(leave())
    assert abandoned._llm is not None
    with abandoned._llm as llm:
        assert llm.generate("Hello", SamplingParams(max_tokens=2))[0].outputs[0].finish_reason is not None


def test_an_engine_that_nobody_waits_for_any_more_is_closed(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[LLM] = []
    started, cancelled = threading.Event(), threading.Event()

    def slow() -> LLM:
        started.set()
        assert cancelled.wait(PATIENCE)
        loaded.append(LLM(**tiny_pair, kv_cache_memory="8MiB"))
        return loaded[0]

    async def main() -> None:
        llm = AsyncLLM(**tiny_pair)
        monkeypatch.setattr(llm, "_make", slow)
        entering = asyncio.create_task(llm.__aenter__())
        await asyncio.to_thread(started.wait)
        entering.cancel()
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await entering

    asyncio.run(main())
    with pytest.raises(EngineClosed):
        loaded[0].submit("Hello")


class Gate:
    """Holds whoever reads the prompts until it is opened, and notes how often they came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.opened, self.read = threading.Event(), threading.Event(), []
        original = nudging.api.jobs.read_prompt

        def read(prompt: object, *roles: object) -> object:
            self.came.set()
            # The guard against a hang: whoever is held for so long holds the event loop.
            assert self.opened.wait(PATIENCE), "prompts are read in the event loop"
            self.read.append(prompt)
            return original(prompt, *roles)

        monkeypatch.setattr(nudging.api.jobs, "read_prompt", read)

    async def reached(self) -> None:
        await wait_in_loop(self.came.is_set)


def test_the_loop_runs_while_prompts_are_read_and_those_of_one_call_before_the_next_ones(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    async def use(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=2)
        calls = [asyncio.create_task(llm.generate(ps, params)) for ps in (PROMPTS, PROMPTS[:1], ["", "a"])]
        await gate.reached()
        gate.opened.set()
        first, second, refused = await asyncio.gather(*calls, return_exceptions=True)
        assert [len(first), len(second)] == [4, 1]
        assert first[0].outputs[0].token_ids == second[0].outputs[0].token_ids
        assert isinstance(refused, BadRequest)
        assert gate.read == [*PROMPTS, PROMPTS[0], ""]

    run(tiny_pair, use)


def test_a_call_that_is_cancelled_while_its_prompts_are_read_leaves_nothing_running(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    async def use(llm: AsyncLLM) -> None:
        call = asyncio.create_task(llm.generate(PROMPTS, LONG))
        await gate.reached()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.opened.set()
        plain = llm._llm
        assert plain is not None
        await wait_in_loop(lambda: plain.stats().totals.finished.get("abort", 0) == len(PROMPTS))
        await aborted(llm)

    run(tiny_pair, use)


def test_the_loop_runs_on_between_results_that_are_there(tiny_pair: Pair) -> None:
    async def use(llm: AsyncLLM) -> None:
        assert llm._llm is not None
        handles = llm._llm.submit_all(PROMPTS, SamplingParams(max_tokens=1))
        for handle in handles:
            handle.result()
        turns, collecting = 0, asyncio.create_task(results(handles))
        while not collecting.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns >= len(PROMPTS)

    run(tiny_pair, use)
