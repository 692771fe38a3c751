"""The one thread that steps an engine; everyone else talks to it through a queue of commands.

`EngineLoop` is what the thread runs.  `EngineThread` is what callers hold: an LLM, its handles and its open
texts.  The loop knows none of them, so that an engine nobody can reach any more ends (see `_last_will`).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from nudging.core.engine import Engine
from nudging.core.engine_loop import EngineLoop, Mailbox, Order, Submission, drained
from nudging.core.guard import tell
from nudging.core.request import Request
from nudging.core.waiting import Call
from nudging.errors import BadRequest, EngineClosed

T = TypeVar("T")
# So long the end of the process waits for a step to end; what takes longer stands still.
EXIT_SECONDS = 60.0


class EngineThread:
    """An engine in callers' hands.  When nobody holds it any more, it ends by itself."""

    def __init__(
        self,
        engine: Engine,
        records_ahead: bool = True,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`records_ahead`: while there is no work, recordings are made for batches that may come.
        `on_stop`: called when all has ended.
        """
        self.loop = EngineLoop(engine, records_ahead, on_stop)
        self.is_draining = False
        # Called with every request that has ended.  Here and not in the engine, whose thread must not hold
        # what a listener holds.
        self.listeners: list[Callable[[Request], object]] = []
        listeners = weakref.WeakMethod(self._tell)
        engine.on_end.append(lambda request: (listeners() or _nobody)(request))
        self._process = os.getpid()
        self._thread = self._start()
        self._will = weakref.finalize(
            self, _last_will, weakref.ref(self), self.loop, self._thread, self._process
        )

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self.loop.run, name="nudging-engine", daemon=True)
        # A process that ends waits for it, held by somebody or not.
        weakref.finalize(thread, _see_out, weakref.ref(thread), os.getpid())
        thread.start()
        return thread

    def submit(
        self, requests: list[Request], mailbox: Mailbox, prepare: Callable[[], None] = lambda: None
    ) -> None:
        """Queue requests that fit and report to `mailbox`; waits for no step.  Raises EngineClosed."""
        self.check_open()
        if self.is_draining:
            raise drained()
        self.loop.post(Submission(self.loop, requests, mailbox, prepare))

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests with "abort"; finished ones stay as they are, and after close there is nothing to
        end.
        """
        self.check_process()
        loop = self.loop
        loop.post(Order(lambda: loop.abort(requests)))

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread, between two steps, and return or raise what it does.

        Where this is left by an exception, it is not run any more.
        """
        if self.is_current:
            return function()
        call = Call(function)
        try:
            self.post(call)
            return call.wait()
        except BaseException:
            call.call_off()
            raise

    def post(self, call: Call[T]) -> None:
        """Queue a call for the engine's thread.  Raises EngineClosed."""
        self.check_open()
        self.loop.post(call)

    @property
    def is_current(self) -> bool:
        """Whether this is the engine's own thread."""
        return threading.current_thread() is self._thread

    def check_may_wait(self, what: str) -> None:
        """Raise BadRequest on the engine's own thread, which would wait for itself, and EngineClosed in a
        forked child, where nobody would ever come.
        """
        self.check_process()
        if self.is_current:
            raise BadRequest(
                f"{what} waits for the engine and was called on the engine's own thread, in a policy's step "
                "or a listener; call it on another thread, or submit() and look at the handle later"
            )

    def check_open(self) -> None:
        """Raise EngineClosed once the engine is closed."""
        self.check_process()
        if self.loop.is_closing:
            raise self.loop.closed_error()

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child of the process that opened the engine."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise EngineClosed in a forked child: threads do not come along."""
        if self.is_forked:
            raise EngineClosed(
                f"this LLM was opened in process {self._process} and cannot be used in its forked child "
                f"{os.getpid()}; open it after the fork, or start processes with the method 'spawn'"
            )

    def drain(self, timeout: float | None) -> None:
        """Take no more requests and wait until all have ended.  Raises TimeoutError; they go on."""
        self.check_process()
        self.check_may_wait("drain()")
        loop = self.loop
        if loop.is_closing:
            return
        self.is_draining = True
        # Once this is obeyed, all requests that came before are the engine's.
        fence = Call(loop.drain)
        loop.post(fence)
        try:
            fence.wait()
        except EngineClosed:
            return
        if not loop.news.wait_for(lambda: not loop.jobs or loop.has_ended, timeout):
            raise TimeoutError(f"{len(loop.jobs)} requests did not end within {timeout} s; close() ends them")

    def close(self) -> None:
        """End every request with "abort", stop the thread and wait for it.  A second call does nothing.

        On the engine's own thread it waits for nothing.  In a forked child there is nothing to end.
        """
        if self.is_forked:
            return
        self.loop.stop()
        if not self.is_current:
            self.loop.news.wait_for(lambda: self.loop.has_ended)
            self._thread.join()
            self._will.detach()

    def _tell(self, request: Request) -> None:
        tell(tuple(self.listeners), request)


def _nobody(request: Request) -> None:
    """Hears of requests whose engine nobody holds any more."""


def _last_will(holder: weakref.ref[Any], loop: EngineLoop, thread: threading.Thread, process: int) -> None:
    """An engine that was not closed ends where nobody holds it any more, or with its process.

    The interpreter stops a thread that is still under way wherever it stands; in the midst of C++ that
    aborts the process.  So its end waits for the thread, whatever comes meanwhile.
    """
    if os.getpid() != process:
        return
    loop.stop()
    if holder() is None:
        # This may be any thread, at any point of its work, the engine's own, too: it waits for nothing.
        warnings.warn(
            "an LLM was dropped without close(); use it as a context manager or close it",
            ResourceWarning,
            stacklevel=2,
        )
        return
    _see_out(lambda: thread, process)


def _see_out(alive: Callable[[], threading.Thread | None], process: int) -> None:
    """Wait until a thread has ended that was told to, whatever comes meanwhile."""
    thread, end = alive(), time.monotonic() + EXIT_SECONDS
    while thread is not None and os.getpid() == process and thread.is_alive() and time.monotonic() < end:
        try:
            thread.join(end - time.monotonic())
        except KeyboardInterrupt:
            # The process is ending already, and this is what it waits for.
            continue
