"""A bar on standard error while texts are written."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

    from nudging.api.handle import Handle

REFRESH_S = 0.1


class Meter:
    """Shows how far all jobs are, tokens per second and the nudge rate."""

    def __init__(self, shown: bool, total: int | None = None, done: int = 0) -> None:
        """`shown`: whether there is a bar at all.  `total`: of all jobs, where it is known, `done` of them
        before.
        """
        self._seen: dict[Handle, list[int]] = {}
        self._done = done
        self._tokens = self._nudged = 0
        self._began = self._refreshed = time.monotonic()
        self._exit = ExitStack()
        self._bar = make_bar() if shown else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._exit.enter_context(self._bar)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._show(self._bar)
        self._exit.close()

    def begin(self, handle: Handle) -> None:
        """A job is on its way."""
        if self._bar is not None:
            self._seen[handle] = [0] * handle.num_outputs

    def end(self, handle: Handle) -> None:
        """A job has ended."""
        self._done += 1
        if self._bar is not None:
            self._count(handle)
            del self._seen[handle]

    def refresh(self) -> float | None:
        """Show how far all are, unless that was done just now; returns when to come back, in seconds."""
        if self._bar is None:
            return None
        if time.monotonic() - self._refreshed >= REFRESH_S:
            self._show(self._bar)
            self._refreshed = time.monotonic()
        return REFRESH_S

    def _show(self, bar: Progress) -> None:
        for handle in self._seen:
            self._count(handle)
        speed = self._tokens / max(time.monotonic() - self._began, 1e-9)
        rate = self._nudged / max(self._tokens, 1)
        bar.update(self._task, completed=self._done, description=f"{speed:.0f} tokens/s, {rate:.0%} nudged")

    def _count(self, handle: Handle) -> None:
        """Add what the handle's texts have gained."""
        seen = self._seen[handle]
        for i, count in enumerate(seen):
            delta = handle.take(i, count)
            if delta is not None:
                seen[i] += len(delta.token_ids)
                self._tokens += len(delta.token_ids)
                self._nudged += sum(author != "base" for author in delta.authors)


def make_bar() -> Progress:
    """A bar of jobs; of how many, and how long it takes, where that is known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nudging.cli.terminal import Terminal

    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    return Progress(*columns, TimeRemainingColumn(), console=Terminal(stderr=True))
