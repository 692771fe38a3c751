"""The one thread that steps an engine; everyone else talks to it through a queue of commands."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nudging.engine import Engine
from nudging.errors import EngineClosed
from nudging.handle import Handle
from nudging.record_ahead import record_ahead
from nudging.request import Request

T = TypeVar("T")
# Nothing is recorded ahead before it has been quiet for so long: who sends one request after the other shall
# not wait for a recording each time.
IDLE_SECONDS = 0.25


class EngineThread:
    """Steps the engine while there is work and sleeps otherwise.  Every request ends exactly once."""

    def __init__(self, engine: Engine, records_ahead: bool = True) -> None:
        """`records_ahead`: while there is no work, recordings are made for batches that may come."""
        self._engine = engine
        self._records_ahead = records_ahead
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._process = os.getpid()
        self._closing = False
        self._draining = False
        self._failure: BaseException | None = None
        self._handles: dict[str, Handle] = {}
        self._thread = self._start()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="nudging-engine", daemon=True)
        thread.start()
        return thread

    def submit(self, requests: list[Request], handle: Handle) -> None:
        """Queue requests that fit and report to `handle`; waits for no step.  Raises EngineClosed."""
        self.check_process()
        with self._wake:
            if self._draining:
                self.check_open()
                raise EngineClosed("drain() was called: the engine takes no more requests; open a new LLM")
            added = self._post(lambda: self._add(requests, handle))
        # Not `added` itself: it would hold all that the request has until the garbage collector came.
        added.add_done_callback(lambda done: self._refuse(requests, handle, done.exception()))

    def cancel(self, requests: list[Request]) -> None:
        """End requests with "abort"; finished ones stay as they are, and after close there is nothing to
        end.
        """
        self.check_process()
        with self._wake:
            if not self._closing:
                self._commands.append((lambda: self._abort(requests), Future()))
                self._wake.notify_all()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread, between two steps, and return or raise what it does."""
        if threading.current_thread() is self._thread:
            return function()
        return self._post(function).result()

    def _post(self, function: Callable[[], T]) -> Future[T]:
        """Queue `function` for the engine's thread.  Raises EngineClosed."""
        self.check_process()
        future: Future[T] = Future()
        with self._wake:
            self.check_open()
            self._commands.append((function, future))
            self._wake.notify_all()
        return future

    def check_open(self) -> None:
        """Raise EngineClosed once the engine is closed."""
        self.check_process()
        if self._closing:
            raise self._closed_error()

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked child of the process that opened the engine."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise EngineClosed in a forked child: threads do not come along, and locks may be held for ever."""
        if self.is_forked:
            raise EngineClosed(
                f"this LLM was opened in process {self._process} and cannot be used in its forked child "
                f"{os.getpid()}; open it after the fork, or start processes with the method 'spawn'"
            )

    def drain(self, timeout: float | None) -> None:
        """Take no more requests and wait until all have ended.  Raises TimeoutError; they go on."""
        self.check_process()
        assert threading.current_thread() is not self._thread, "the engine's thread cannot wait for itself"
        with self._wake:
            if self._closing:
                return
            self._draining = True
            # Once this is obeyed, all requests that came before are the engine's.
            added = self._post(lambda: None)
        added.exception()
        with self._wake:
            if not self._wake.wait_for(lambda: not self._handles, timeout):
                raise TimeoutError(
                    f"{len(self._handles)} requests did not end within {timeout} s; close() ends them"
                )

    def close(self) -> None:
        """End every request with "abort", stop the thread and wait for it.  A second call does nothing.

        In a forked child there is nothing to end.
        """
        if self.is_forked:
            return
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _closed_error(self) -> EngineClosed:
        error = EngineClosed("the engine is closed; open a new LLM")
        if self._failure is not None:
            error = EngineClosed(f"the engine stopped: {self._failure!r}; open a new LLM")
            error.__cause__ = self._failure
        return error

    def _add(self, requests: list[Request], handle: Handle) -> None:
        for request in requests:
            self._engine.check_fits(request)
        for request in requests:
            self._handles[request.id] = handle
            self._engine.add(request)

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            if request.id in self._handles:
                self._engine.abort(request)
                self._report(request)

    def _refuse(self, requests: list[Request], handle: Handle, error: BaseException | None) -> None:
        """End requests that could not be added; one that a close overtook ends as if it had run."""
        if error is None:
            return
        for request in requests:
            if isinstance(error, EngineClosed) and self._failure is None:
                request.finish("abort")
            else:
                request.fail(error)
            handle.notify(request)

    def _report(self, request: Request) -> None:
        handle = self._handles[request.id]
        if request.is_finished:
            del self._handles[request.id]
        handle.notify(request)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        except BaseException as error:  # noqa: BLE001 - a broken engine must not leave anyone waiting
            self._failure = error
        self._end_everything()

    def _turn(self) -> None:
        """Obey what was asked for, then step once."""
        while self._commands:
            obey(*self._commands.popleft())
        if self._engine.has_work:
            for request in self._engine.step():
                self._report(request)
        if self._draining:
            with self._wake:
                self._wake.notify_all()

    def _wait_for_work(self) -> bool:
        """Until there is work, recording ahead after a while; False once the engine is closed."""
        patience = IDLE_SECONDS if self._records_ahead else None
        while not self._is_woken(patience):
            patience = 0.0 if record_ahead(self._engine.runners.values()) else None
        return not self._closing

    def _is_woken(self, timeout: float | None) -> bool:
        with self._wake:
            return self._wake.wait_for(
                lambda: self._closing or bool(self._commands) or self._engine.has_work, timeout
            )

    def _end_everything(self) -> None:
        with self._wake:
            self._closing = True
            commands, self._commands = self._commands, deque()
        for request in (*self._engine.scheduler.running, *self._engine.scheduler.waiting):
            if self._failure is not None:
                request.fail(self._closed_error())
                self._report(request)
            else:
                self._abort([request])
        for _, future in commands:
            future.set_exception(self._closed_error())
        with self._wake:
            self._wake.notify_all()


def obey(function: Callable[[], Any], future: Future[Any]) -> None:
    """Run a command and hand its result or its error to whoever waits for it."""
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001 - the caller's to handle, not the engine's
        future.set_exception(error)
