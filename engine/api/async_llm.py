"""`AsyncLLM`: the same engine for code that awaits.  It polls nothing and keeps no thread per request."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from typing import Any, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from nudging.api.arguments import Speculate
from nudging.api.async_generation import AsyncGeneration
from nudging.api.async_handle import AsyncHandle, AsyncStream, awaited, called, results
from nudging.api.generation import scores
from nudging.api.handle import Handle
from nudging.api.llm import LLM, POCKET
from nudging.api.llm_options import LLMOptions
from nudging.api.loading import Checkpoint
from nudging.api.outputs import RequestOutput
from nudging.api.scores import pair_up
from nudging.checks import called_like, strict_call
from nudging.core.frozen import snapshot
from nudging.core.request import Request
from nudging.core.request_options import ChatOptions, RequestOptions, SubmitOptions
from nudging.core.sampling_params import SamplingParams
from nudging.core.stats import EngineStats
from nudging.errors import EngineClosed
from nudging.policies.protocol import Policy
from nudging.text.prompts import Messages, Prompt
from nudging.text.role_tokenizer import RoleTokenizer
from nudging.text.roles import Role


class AsyncLLM:
    """`LLM` with `async`: the same options, the same results, for one event loop.

    The constructor takes `LLM`'s arguments and loads nothing.  Entering the context loads the models in a
    worker thread, and so does `await AsyncLLM.create(...)`; both raise what `LLM(...)` raises, and all other
    methods raise EngineClosed before that and after `close()`.  Cancelling a task that awaits a result
    cancels its request.
    """

    @strict_call("AsyncLLM")
    @called_like(LLM.__init__)
    def __init__(
        self, base: Checkpoint, guide: Checkpoint | None = None, **options: Unpack[LLMOptions]
    ) -> None:
        self._prepare(functools.partial(LLM, base, guide, **options))

    @classmethod
    @called_like(LLM.__init__)
    async def create(
        cls, base: Checkpoint, guide: Checkpoint | None = None, **options: Unpack[LLMOptions]
    ) -> Self:
        """A loaded engine; `await close()` it, or enter it as a context."""
        return await cls(base, guide, **options).__aenter__()

    @classmethod
    @strict_call("AsyncLLM.pocket")
    @called_like(LLM.__init__, **POCKET)
    def pocket(
        cls,
        base: Checkpoint = "pocket:base",
        guide: Checkpoint | None = "pocket:guide",
        **options: Unpack[LLMOptions],
    ) -> Self:
        """The shipped pair, as `LLM.pocket`; loads nothing yet."""
        llm = cls.__new__(cls)
        llm._prepare(functools.partial(LLM.pocket, base, guide, **options))
        return llm

    def _prepare(self, make: Callable[[], LLM]) -> None:
        self._make = make
        self._llm: LLM | None = None
        # Many prompts are started in the order in which they were handed in.
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        if self._llm is None:
            loading = asyncio.get_running_loop().run_in_executor(None, self._make)
            try:
                # Loading cannot be interrupted: a cancelled caller leaves, and the models go when they come.
                self._llm = await asyncio.shield(loading)
            except BaseException:
                loading.add_done_callback(close_unwanted)
                raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every request with "abort" and free all memory.  May be called twice."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.close)

    async def drain(self, timeout: float | None = None) -> None:
        """As `LLM.drain`."""
        await asyncio.to_thread(self._opened().drain, timeout)

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> list[RequestOutput]:
        """As `LLM.generate`."""
        start = self._opened().submit_all
        return await self._results(
            functools.partial(start, prompts, sampling_params, policy, speculate, **options)
        )

    async def chat(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """As `LLM.chat`."""
        start = self._opened().submit_chats
        return await self._results(
            functools.partial(start, messages, sampling_params, policy, speculate, **options)
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncStream:
        """As `LLM.stream`, for `async for`; for the event loop it is called in."""
        return AsyncStream(self._opened().submit(prompt, sampling_params, policy, speculate, **options))

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """Like `stream`, for a conversation."""
        return AsyncStream(
            self._opened().submit_chat(messages, sampling_params, policy, speculate, **options)
        )

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncHandle:
        """Start one prompt and return at once.  Raises BadRequest, EngineClosed."""
        return awaited(self._opened().submit(prompt, sampling_params, policy, speculate, **options))

    def submit_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncHandle:
        """Like `submit`, for a conversation."""
        return awaited(self._opened().submit_chat(messages, sampling_params, policy, speculate, **options))

    def submit_all(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> list[AsyncHandle]:
        """As `LLM.submit_all`."""
        handles = self._opened().submit_all(prompts, sampling_params, policy, speculate, **options)
        return [AsyncHandle(handle) for handle in handles]

    def submit_chats(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[AsyncHandle]:
        """As `LLM.submit_chats`."""
        handles = self._opened().submit_chats(messages, sampling_params, policy, speculate, **options)
        return [AsyncHandle(handle) for handle in handles]

    def open(
        self, prompt: Prompt, policy: Policy | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGeneration:
        """As `LLM.open`; use it as an async context manager."""
        return AsyncGeneration(self._opened().open(prompt, policy, **options))

    async def logits(self, role: str, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """As `LLM.logits`."""
        llm = self._opened()
        return await called(llm._thread, llm._logits(role, token_ids))

    @overload
    async def score(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        continuation: str | Iterable[int],
        policy: Policy | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[float]: ...
    @overload
    async def score(
        self,
        prompt: Prompt | Iterable[Prompt],
        continuation: str | Iterable[str] | Iterable[Iterable[int]],
        policy: Policy | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[list[float]]: ...
    async def score(
        self,
        prompt: Any,
        continuation: Any,
        policy: Policy | None = None,
        **options: Unpack[RequestOptions],
    ) -> Any:
        """As `LLM.score`."""
        pairs, are_several = pair_up(prompt, continuation)
        start = functools.partial(self._opened()._jobs.submit_scores, pairs, policy, options)
        found = [scores(result) for result in await self._results(start)]
        return found if are_several else found[0]

    def stats(self) -> EngineStats:
        """As `LLM.stats`."""
        return self._opened().stats()

    def abort(self, request_id: str) -> bool:
        """As `LLM.abort`."""
        return self._opened().abort(request_id)

    def get_tokenizer(self, role: str = "base") -> RoleTokenizer:
        """As `LLM.get_tokenizer`."""
        return self._opened().get_tokenizer(role)

    def on_end(self, listener: Callable[[Request], None]) -> None:
        """As `LLM.on_end`: on the engine's thread, not the event loop's."""
        self._opened().on_end(listener)

    @property
    def roles(self) -> dict[str, Role]:
        """The open roles, by their names."""
        return self._opened().roles

    @property
    def default_policy(self) -> Policy:
        """As `LLM.default_policy`."""
        return self._opened().default_policy

    @property
    def is_alive(self) -> bool:
        """Whether requests are served: the models are loaded and the engine has not ended."""
        return self._llm is not None and self._llm.is_alive

    def check_health(self) -> None:
        """Raise EngineClosed, with the reason, where no request is served."""
        self._opened().check_health()

    def __repr__(self) -> str:
        return "<AsyncLLM, not loaded>" if self._llm is None else f"<Async{repr(self._llm)[1:]}"

    async def _results(self, start: functools.partial[Any]) -> list[RequestOutput]:
        """The results of all that `start` starts; a cancelled task cancels all of it.

        Prompts are checked and cut into tokens in a worker thread: thousands of them would hold the loop.
        What is read there is a copy: the caller may already be at the next message.
        """
        start = functools.partial(start.func, *snapshot(start.args), **snapshot(start.keywords))
        async with self._turn:
            starting = asyncio.get_running_loop().run_in_executor(None, start)
            try:
                handles = await asyncio.shield(starting)
            except BaseException:
                starting.add_done_callback(cancel_unwanted)
                raise
        return await results(handles)

    def _opened(self) -> LLM:
        if self._llm is None:
            raise EngineClosed(
                "the models are not loaded yet; use `async with AsyncLLM(...) as llm` or "
                "`llm = await AsyncLLM.create(...)`"
            )
        return self._llm


def cancel_unwanted(starting: asyncio.Future[list[Handle]]) -> None:
    """Cancel what nobody waits for any more."""
    if not starting.cancelled() and starting.exception() is None:
        for handle in starting.result():
            handle.cancel()


def close_unwanted(loading: asyncio.Future[LLM]) -> None:
    """Close an engine that nobody waits for any more."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()
