"""A bar on standard error while texts are written."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nudging.handle import Handle
from nudging.output import RequestOutput

REFRESH_S = 0.1


class Meter:
    """Waits for results and meanwhile shows how far all jobs are, tokens per second and the nudge rate."""

    def __init__(self, handles: list[Handle], shown: bool) -> None:
        """`shown`: whether there is a bar at all."""
        self._seen = {handle: [0] * handle.num_outputs for handle in handles}
        self._open = list(handles)
        self._tokens = self._nudged = 0
        self._began = time.monotonic()
        self._exit = ExitStack()
        self._bar: Progress | None = None
        if shown:
            columns = (
                TextColumn("writing"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=len(handles))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._exit.enter_context(self._bar)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._refresh(self._bar)
        self._exit.close()

    def wait(self, handle: Handle) -> RequestOutput:
        """The handle's result."""
        while self._bar is not None and not handle.is_finished:
            self._refresh(self._bar)
            try:
                return handle.result(timeout=REFRESH_S)
            except TimeoutError:
                continue
        return handle.result()

    def _refresh(self, bar: Progress) -> None:
        # Which have ended is read first: what they gain between the two reads is then still counted.
        ended = {handle for handle in self._open if handle.is_finished}
        for handle in self._open:
            self._count(handle)
        self._open = [handle for handle in self._open if handle not in ended]
        finished = len(self._seen) - len(self._open)
        speed = self._tokens / max(time.monotonic() - self._began, 1e-9)
        rate = self._nudged / max(self._tokens, 1)
        bar.update(self._task, completed=finished, description=f"{speed:.0f} tokens/s, {rate:.0%} nudged")

    def _count(self, handle: Handle) -> None:
        """Add what the handle's texts have gained."""
        seen = self._seen[handle]
        for i, count in enumerate(seen):
            delta = handle.take(i, count)
            if delta is not None:
                seen[i] += len(delta.token_ids)
                self._tokens += len(delta.token_ids)
                self._nudged += sum(author != "base" for author in delta.authors)
