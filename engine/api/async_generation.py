"""`AsyncGeneration`: an open text for code that awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Self

from nudging.api.async_handle import AsyncHandle
from nudging.api.generation import Generation, Leaving, extended, scores
from nudging.api.handle import Handle
from nudging.api.outputs import CompletionOutput, RequestOutput
from nudging.core.sampling_params import SamplingParams


class AsyncGeneration:
    """As `Generation`; calls of several tasks come one after the other.

    A cancelled task leaves at once, its request ends, and the text is as it was before the call.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def token_ids(self) -> list[int]:
        return self._generation.token_ids

    @property
    def authors(self) -> list[str]:
        return self._generation.authors

    @property
    def text(self) -> str:
        """The text so far."""
        return self._generation.text

    async def extend(
        self, sampling_params: SamplingParams | None = None, *, text: str | Sequence[int] | None = None
    ) -> CompletionOutput:
        """As `Generation.extend`."""
        async with self._turn:
            if text is not None:
                return self._generation.extend(text=text)
            with Leaving(self._generation):
                return extended(self._generation, await result(self._generation.begin(sampling_params)))

    async def fork(self) -> AsyncGeneration:
        """As `Generation.fork`."""
        async with self._turn:
            return AsyncGeneration(await asyncio.to_thread(self._generation.fork))

    async def rewind(self, length: int) -> None:
        """As `Generation.rewind`."""
        async with self._turn:
            self._generation.rewind(length)

    async def score(self, continuation: str | Sequence[int]) -> list[float]:
        """As `Generation.score`."""
        async with self._turn:
            with Leaving(self._generation):
                return scores(await result(self._generation.begin_score(continuation)))

    async def close(self) -> None:
        """As `Generation.close`."""
        async with self._turn:
            await asyncio.to_thread(self._generation.close)


async def result(handle: Handle) -> RequestOutput:
    """What a request comes to."""
    return await AsyncHandle(handle).result()
