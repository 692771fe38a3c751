"""How one thread waits for another: no exception, wherever it comes, leaves anything taken.

An interrupt may come between any two instructions of the main thread.  A lock that was taken there and not
given back would stop the engine's thread for ever.  So nobody holds a lock that another thread asks for: a
waiting thread brings a lock of its own, and the thread that has news opens it.  All that two threads share is
changed by single calls into C (`append`, `popleft`, `put`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Bell:
    """Rung where something has changed; waiting threads look again."""

    def __init__(self) -> None:
        # The locks of those who wait, each taken by its owner; one that was left here is opened in vain.
        self._waiting: deque[Any] = deque()

    @property
    def is_awaited(self) -> bool:
        return bool(self._waiting)

    def ring(self) -> None:
        """Wake all who wait now.  Callable from any thread."""
        for _ in range(len(self._waiting)):
            with suppress(IndexError):
                self._waiting.popleft().release()

    def wait_for(self, happened: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `happened()`; False after `timeout` seconds.  Asked anew whenever the bell was rung."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
            # Asked only now: what changes from here on rings for this turn.
            try:
                if happened():
                    return True
                left = -1.0 if end is None else end - time.monotonic()
                if end is not None and left <= 0:
                    return False
                turn.acquire(timeout=min(left, threading.TIMEOUT_MAX))
            finally:
                with suppress(ValueError):
                    self._waiting.remove(turn)


class Call(Generic[T]):
    """A function for the engine's thread, and what came of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function: Callable[[], T] | None = function
        self._over = Bell()
        self._is_over = False
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """The engine's side.  Whatever the function raises is for whoever waits."""
        function, self._function = self._function, None
        # A caller who has left needs it no more.
        if function is not None:
            try:
                self._result = function()
            except BaseException as error:  # noqa: BLE001 - the caller's to handle, not the engine's
                self._error = error
        self._end()

    def refuse(self, error: BaseException) -> None:
        """The engine's side: it will not be run."""
        self._error = error
        self._end()

    def wait(self) -> T:
        """What the function returns or raises; None where it was called off."""
        self._over.wait_for(lambda: self._is_over)
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Else the error would hold itself, by way of this frame.
                del error
        result: T = self._result  # type: ignore[assignment]
        return result

    def call_off(self) -> None:
        """Nobody waits any more: it is not run, if it was not begun."""
        self._function = None

    def _end(self) -> None:
        self._is_over = True
        self._over.ring()
