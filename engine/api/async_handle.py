"""A submitted job for code that awaits."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Self, TypeVar

from nudging.api.handle import Handle
from nudging.api.outputs import Delta, RequestOutput
from nudging.core.engine_thread import EngineThread
from nudging.core.waiting import Call

T = TypeVar("T")


class AsyncHandle:
    """A submitted prompt, for the event loop it was submitted from."""

    def __init__(self, handle: Handle) -> None:
        """Raises RuntimeError outside of an event loop."""
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._moved = asyncio.Event()
        self._is_woken = False
        # The engine holds its listeners: by this one it holds nobody who may be forgotten.
        wake = weakref.WeakMethod(self._wake)
        handle.add_listener(lambda: None if (awake := wake()) is None else awake())

    @property
    def request_id(self) -> str:
        return self._handle.request_id

    @property
    def is_finished(self) -> bool:
        return self._handle.is_finished

    def cancel(self) -> None:
        """End what is not finished yet, with the finish reason "abort"; what was written stays."""
        self._handle.cancel()

    async def result(self) -> RequestOutput:
        """Wait for all continuations.  A task cancelled here cancels the request (else use shield)."""
        try:
            while not self._handle.is_finished:
                await self._change()
        except BaseException:
            self.cancel()
            raise
        return self._handle.result(timeout=0)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas as they come, of all continuations; each ends with one whose `finish_reason` is set."""
        seen = [0] * self._handle.num_outputs
        open_ones = set(range(self._handle.num_outputs))
        while open_ones:
            deltas = [self._handle.take(i, seen[i]) for i in sorted(open_ones)]
            if not any(deltas):
                await self._change()
            for delta in filter(None, deltas):
                seen[delta.index] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    open_ones.discard(delta.index)
                yield delta

    async def _change(self) -> None:
        """Wait until something moved since the last look; the caller looks again afterwards."""
        await self._moved.wait()
        self._is_woken = False
        self._moved.clear()

    def _wake(self) -> None:
        """The engine's thread: wake the event loop, unless it is awake or gone."""
        if self._loop.is_closed():
            # It was closed over a running request: nobody is left to read it.
            self._handle.abandon()
        elif not self._is_woken:
            # One call at most waits in a loop that is busy elsewhere.
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._moved.set)
            except RuntimeError:
                assert self._loop.is_closed(), "the event loop refused a call while it was open"
                self._handle.abandon()


class AsyncStream(AsyncIterator[Delta]):
    """A job's deltas, read by one who owns it: closing it, a cancelled task and dropping it cancel what is
    not written yet.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._async_handle = AsyncHandle(handle)
        self._deltas = aiter(self._async_handle)

    @property
    def handle(self) -> AsyncHandle:
        """The job's; its `result()` is the whole text."""
        return self._async_handle

    @property
    def request_id(self) -> str:
        """The job's id, for `AsyncLLM.abort`."""
        return self._handle.request_id

    def cancel(self) -> None:
        """End the text here, with the finish reason "abort"; the deltas up to there still come."""
        self._handle.cancel()

    async def __anext__(self) -> Delta:
        try:
            return await anext(self._deltas)
        except BaseException:
            self._handle.cancel()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # An interrupt may have come before there was a handle.
        handle = getattr(self, "_handle", None)
        if handle is not None:
            handle.abandon()

    async def aclose(self) -> None:
        """Cancel what is not finished yet; the stream ends."""
        self._handle.cancel()
        await self._deltas.aclose()  # type: ignore[attr-defined]


def awaited(handle: Handle) -> AsyncHandle:
    """What was just submitted, for the running event loop; without one it is cancelled."""
    try:
        return AsyncHandle(handle)
    except BaseException:
        handle.abandon()
        raise


async def called(thread: EngineThread, function: Callable[[], T]) -> T:
    """As `EngineThread.call`, for code that awaits."""
    call = Call(function)
    try:
        thread.post(call)
        return await asyncio.to_thread(call.wait)
    except BaseException:
        call.call_off()
        raise


async def results(handles: list[Handle]) -> list[RequestOutput]:
    """All results in order; left by an exception, a cancelled task's too, it cancels all requests."""
    collected = []
    try:
        for handle in handles:
            # Where many have ended, collecting them all at once would hold the loop.
            await asyncio.sleep(0)
            collected.append(await AsyncHandle(handle).result())
    except BaseException:
        for handle in handles:
            handle.abandon()
        raise
    return collected
