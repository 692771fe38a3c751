"""How tests wait: for what must come, as long as it takes; no test passes because of what a clock reads.

The seconds here are for a test that hangs.  On a machine that is busy with other things everything may take
a hundred times as long as on an idle one, so they are many.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Self
from unittest import mock

# Seconds after which a test counts as hung.
PATIENCE = 600.0
PAUSE = 0.005


def wait_until(is_done: Callable[[], object]) -> None:
    """Ask again and again, for what no event tells."""
    for _ in range(int(PATIENCE / PAUSE)):
        if is_done():
            return
        time.sleep(PAUSE)
    raise AssertionError(f"it did not come to pass within {PATIENCE:.0f} seconds")


def give_time(seconds: float = 10 * PAUSE) -> None:
    """Let happen what must not: right code passes at any speed, and wrong code mostly does not."""
    time.sleep(seconds)


async def wait_in_loop(is_done: Callable[[], object]) -> None:
    """As `wait_until`, while the event loop goes on."""
    for _ in range(int(PATIENCE / PAUSE)):
        if is_done():
            return
        await asyncio.sleep(PAUSE)
    raise AssertionError(f"it did not come to pass within {PATIENCE:.0f} seconds")


class Stopped:
    """An engine that stands still between two steps: after so many, or as soon as it comes to one.

    As a context: when it is left, the engine goes on.  So a test may do what it wants in the middle of a
    text, however fast the engine is and however slow the test.
    """

    def __init__(self, engine: Any, steps: int = 0) -> None:
        self._left, self._stands = steps, False
        self._changed = threading.Condition()
        self._step = engine.step
        self._patch = mock.patch.object(engine, "step", self._stop_or_step)

    def _stop_or_step(self) -> Any:
        with self._changed:
            self._stands = self._left == 0
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._left > 0, PATIENCE)
            self._left, self._stands = self._left - 1, False
        return self._step()

    def _let(self, steps: int) -> None:
        with self._changed:
            self._left += steps
            self._changed.notify_all()

    def reached(self) -> None:
        """Wait until it stands still."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._stands and self._left == 0, PATIENCE)

    def step_on(self) -> None:
        """Let it make a step, obey what it has been told meanwhile, and stand still before the next."""
        self._let(1)
        self.reached()

    def __enter__(self) -> Self:
        self._patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.stop()
        self._let(1 << 60)
