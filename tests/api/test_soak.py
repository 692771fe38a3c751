"""Ten thousand requests through one engine: all are answered, and memory stays where it was."""

import asyncio
import ctypes
import gc
import platform
import random
import resource
import sys
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.api.async_llm import AsyncHandle
from nudging.api.handle import Handle
from tests.support.simulated import VOCAB, Setup, SimLLM
from tests.support.waiting import PATIENCE

IN_FLIGHT = 16
LONGEST_PROMPT = 24
POLICIES = [Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word")]
IS_GLIBC = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not IS_GLIBC, reason="only glibc is asked what malloc gave out")


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [  # noqa: RUF012
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")
        + ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def mallinfo2() -> MallInfo:
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    info: MallInfo = ask()
    return info


def serve(llm: LLM, rng: random.Random, count: int, vocab: int, longest: int = 16) -> dict[str, int]:
    """Submit `count` requests, some of them cancelled, and read every result; how they ended."""
    ended: dict[str, int] = {}
    open_ones: deque[Handle] = deque()
    for _ in range(count):
        prompt = [rng.randrange(2, vocab) for _ in range(rng.randint(1, LONGEST_PROMPT))]
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
    output = handle.result(timeout=PATIENCE).outputs[0]
    assert output.error is None
    ended[output.finish_reason] = ended.get(output.finish_reason, 0) + 1


class Memory(NamedTuple):
    """What a process holds: Python's objects, the bytes that malloc gave out, and the resident ones."""

    objects: int
    heap: int
    resident: int


def memory() -> Memory:
    """Where the C library is not glibc, of which alone we ask it, only objects are counted."""
    gc.collect()
    if not IS_GLIBC:
        return Memory(sys.getallocatedblocks(), 0, 0)
    malloc = mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Memory(sys.getallocatedblocks(), malloc.uordblks + malloc.hblkhd, pages * resource.getpagesize())


def warm_up(llm: LLM, requests: int, vocab: int, longest: int) -> None:
    """All that is allocated once: the largest passes there can be, and the shapes of batches that are kept.

    Their high-water mark is a matter of luck otherwise: prompts of 16 requests seldom come together.
    """
    params = SamplingParams(max_tokens=longest, temperature=1.0, seed=0)
    for turn in range(20):
        policy = POLICIES[turn % len(POLICIES)]
        handles = [
            llm.submit([2] * LONGEST_PROMPT, params, policy, cache_salt=str(i)) for i in range(IN_FLIGHT)
        ]
        for handle in handles:
            handle.result(timeout=PATIENCE)
    serve(llm, random.Random(0), requests, vocab, longest)


def soak(llm: LLM, requests: int, vocab: int, longest: int = 16) -> dict[str, int]:
    """Serve `requests` after some to warm up: of a leak of 100 bytes a request, half is noticed."""
    warm_up(llm, max(requests // 10, 1000), vocab, longest)
    before = memory()
    ended = serve(llm, random.Random(1), requests, vocab, longest)
    after = memory()
    grown = Memory(*(b - a for a, b in zip(before, after, strict=True)))
    assert grown.objects < requests / 5, f"{grown} after {requests} requests"
    assert grown.heap < 50 * requests, f"{grown} after {requests} requests"
    assert grown.resident < 1_000_000, f"{grown} after {requests} requests"
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


@pytest.mark.parametrize("where", ["objects", pytest.param("heap", marks=needs_glibc)])
def test_a_leak_of_a_hundred_bytes_a_request_is_noticed(where: str) -> None:
    objects: list[bytes] = []
    heap = bytearray()
    with SimLLM(Setup(blocks=(48, 48)), threaded=True) as llm:
        if where == "objects":
            llm._engine.on_end.append(lambda request: objects.append(bytes(100 - sys.getsizeof(b""))))
        else:
            llm._engine.on_end.append(lambda request: heap.extend(bytes(100)))
        with pytest.raises(AssertionError, match=rf"Memory\(.*{where}=\d{{4}}.* after 2000 requests"):
            soak(llm, 2_000, VOCAB)


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
def test_a_hundred_thousand_requests_leave_nothing_behind() -> None:
    with SimLLM(Setup(blocks=(48, 48)), threaded=True) as llm:
        soak(llm, 100_000, VOCAB)
        assert_pools_are_free(llm)


@pytest.mark.slow
def test_ten_thousand_requests_to_the_pocket_pair_leave_nothing_behind() -> None:
    with LLM.pocket(kv_cache_memory="1MiB") as llm:
        soak(llm, 10_000, llm.roles["base"].vocab_size, longest=3)
        assert_pools_are_free(llm)
