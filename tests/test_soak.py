"""Ten thousand requests through one engine: all are answered, and memory stays where it was."""

import asyncio
import gc
import random
import resource
import sys
import tracemalloc
from collections import deque
from typing import Any

import pytest

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.aio import AsyncHandle
from nudging.handle import Handle
from tests.simulated import VOCAB, Setup, SimLLM

IN_FLIGHT = 16
# ru_maxrss counts kilobytes, on macOS bytes.
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
POLICIES = [Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word")]


def serve(llm: LLM, rng: random.Random, count: int, vocab: int, longest: int = 16) -> dict[str, int]:
    """Submit `count` requests, some of them cancelled, and read every result; how they ended."""
    ended: dict[str, int] = {}
    open_ones: deque[Handle] = deque()
    for _ in range(count):
        prompt = [rng.randrange(2, vocab) for _ in range(rng.randint(1, 24))]
        params = SamplingParams(
            max_tokens=rng.randint(1, longest), temperature=rng.choice([0.0, 1.0]), seed=rng.getrandbits(64)
        )
        options: dict[str, Any] = {"priority": rng.choice([0, 0, 1])}
        open_ones.append(llm.submit(prompt, params, rng.choice(POLICIES), **options))
        if rng.random() < 0.1:
            rng.choice(open_ones).cancel()
        if len(open_ones) == IN_FLIGHT:
            count_end(open_ones.popleft(), ended)
    while open_ones:
        count_end(open_ones.popleft(), ended)
    return ended


def count_end(handle: Handle, ended: dict[str, int]) -> None:
    output = handle.result(timeout=60).outputs[0]
    assert output.error is None
    ended[output.finish_reason] = ended.get(output.finish_reason, 0) + 1


def soak(llm: LLM, requests: int, vocab: int, longest: int = 16) -> dict[str, int]:
    """Serve `requests` after a tenth as many to warm up; not one object in five requests may stay."""
    rng = random.Random(1)
    serve(llm, rng, requests // 10, vocab, longest)
    gc.collect()
    before = sys.getallocatedblocks()
    ended = serve(llm, rng, requests, vocab, longest)
    gc.collect()
    more = sys.getallocatedblocks() - before
    assert more < requests / 5, f"{more} objects more after {requests} requests"
    assert sum(ended.values()) == requests
    return ended


def assert_pools_are_free(llm: LLM) -> None:
    for runner in llm._engine.runners.values():
        assert runner.pool.num_available == runner.pool.total


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    with SimLLM(Setup(blocks=(48, 48)), threaded=True) as llm:
        ended = soak(llm, 10_000, VOCAB)
        assert min(ended[reason] for reason in ("stop", "length", "abort")) > 50
        assert llm.stats().totals.preemptions > 0
        assert_pools_are_free(llm)


async def ask(llm: LLM) -> None:
    await AsyncHandle(llm.submit([2, 3], SamplingParams(max_tokens=4))).result()


def test_what_has_ended_is_freed_without_the_garbage_collector() -> None:
    """That may come late: rows with logits are large, and it counts objects, not bytes."""
    with SimLLM(Setup(blocks=(48, 48)), threaded=True) as llm:
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            serve(llm, random.Random(1), 100, VOCAB)
            asyncio.run(ask(llm))
            llm._thread.call(lambda: None)
            gc.collect()
            ours = {type(one) for one in gc.garbage if type(one).__module__.startswith("nudging")}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not ours


@pytest.mark.slow
def test_a_hundred_thousand_requests_take_no_more_memory_than_a_few_thousand() -> None:
    """By Python's allocator and by the process's peak: less than 1 MB."""
    with SimLLM(Setup(blocks=(48, 48)), threaded=True) as llm:
        serve(llm, random.Random(0), 10_000, VOCAB)
        tracemalloc.start()
        serve(llm, random.Random(1), 1_000, VOCAB)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        serve(llm, random.Random(2), 10_000, VOCAB)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 1_000_000
    with SimLLM(Setup(blocks=(48, 48)), threaded=True) as llm:
        serve(llm, random.Random(0), 4_000, VOCAB)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        serve(llm, random.Random(3), 100_000, VOCAB)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * PEAK_UNIT
        assert grown < 1_000_000, f"{grown} bytes more at the peak"


@pytest.mark.slow
def test_ten_thousand_requests_to_the_pocket_pair_leave_nothing_behind() -> None:
    with LLM.pocket(kv_cache_memory="1MiB") as llm:
        soak(llm, 10_000, llm.roles["base"].vocab_size, longest=3)
        assert_pools_are_free(llm)
