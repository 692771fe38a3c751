"""Ctrl-C and SIGTERM as something a command hears of between two steps, not in the midst of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

# A shell's exit status of what a signal has ended is this and the signal's number.
BY_SIGNAL = 128
# Of the terminal that goes away, too: where it is to be survived (nohup), it is ignored, and stays so.
HEARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal has ended a command, which has said so."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = BY_SIGNAL + number


class Signals:
    """While entered, the first signal is told to `hear` and the next one raises Interrupted where it comes.

    Signals that are ignored stay ignored.  `hear` is called in the midst of anything: it may do no more than
    put its number into a queue.
    """

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear = hear
        self._heard = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        # Elsewhere nobody may set handlers, and no signal arrives.
        if threading.current_thread() is threading.main_thread():
            for number in HEARD:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            raise Interrupted(number)
        self._heard = True
        self._hear(number)
