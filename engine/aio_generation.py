"""`AsyncGeneration`: an open text for code that awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Self

from nudging.generation import Generation
from nudging.output import CompletionOutput
from nudging.params import SamplingParams


class AsyncGeneration:
    """As `Generation`; each call runs in a worker thread, one at a time for one generation.

    A cancelled task leaves at once; the call it awaited still comes to its end.
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
            return await asyncio.to_thread(self._generation.extend, sampling_params, text=text)

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
            return await asyncio.to_thread(self._generation.score, continuation)

    async def close(self) -> None:
        """As `Generation.close`."""
        async with self._turn:
            await asyncio.to_thread(self._generation.close)
