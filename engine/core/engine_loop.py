"""What the engine's thread runs: commands between two steps, steps while there is work, and the end.

The loop knows none of its callers, so that an engine nobody can reach any more ends.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from typing import Protocol

from nudging.core.engine import Engine
from nudging.core.executor import record_ahead
from nudging.core.guard import LOGGER
from nudging.core.request import Request
from nudging.core.waiting import Bell, Call
from nudging.errors import EngineClosed

# Nothing is recorded ahead before it has been quiet for so long: a client that sends one request after
# the other shall not wait for a recording each time.
IDLE_SECONDS = 0.25
# After so many turns what is carried in C++ can be read, for statistics and those who come to read.
READ_TURNS = 16


class Command(Protocol):
    """Something for the engine's thread, done between two steps or refused once."""

    def run(self) -> None: ...
    def refuse(self, error: BaseException) -> None: ...


class Mailbox(Protocol):
    """Where the engine leaves word of a job; see `nudging.api.handle.Mailbox`."""

    def notify(self, request: Request) -> None:
        """The engine's thread: `request` moved or ended."""


class EngineLoop:
    """Steps the engine while there is work and sleeps otherwise.  Every request ends exactly once."""

    def __init__(
        self, engine: Engine, records_ahead: bool, on_stop: Callable[[], None] = lambda: None
    ) -> None:
        """`on_stop` is called when all has ended, on the engine's thread."""
        self.engine = engine
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        # Requests that have not ended, and where to tell of them.
        self.jobs: dict[Request, Mailbox] = {}
        self.is_closing = self.is_draining = self.has_ended = False
        self.failure: BaseException | None = None
        # Rung when all has ended, and when one of the last requests has, while it drains.
        self.news = Bell()
        self._records_ahead = records_ahead
        self._on_stop = on_stop
        self._turns = 0

    def post(self, command: Command) -> None:
        """Any thread: queue a command; one that comes too late is refused at once."""
        self.commands.put(command)
        if self.has_ended:
            self._refuse_commands()

    def stop(self) -> None:
        """Any thread: end everything, soon."""
        self.is_closing = True
        self.post(Call(lambda: None))

    def drain(self) -> None:
        """The engine's thread: take no more requests from here on."""
        self.is_draining = True

    def run(self) -> None:
        """What the engine's thread does, from its beginning to its end."""
        try:
            while self._wait_for_work():
                self.turn()
        except BaseException as error:  # noqa: BLE001 - a broken engine must not leave anyone waiting
            self.failure = error
        self.end()

    def turn(self) -> None:
        """Obey what was asked for, then step once."""
        while not self.commands.empty():
            self.commands.get().run()
        if self.engine.has_work:
            self._turns += 1
            for request in self.engine.step():
                self._report(request)
            if self._turns % READ_TURNS == 0:
                for request in self.engine.scheduler.running:
                    request.read_carried()
        if self.is_draining:
            self.news.ring()

    def end(self) -> None:
        """End every request and refuse what is still asked; after that nobody waits for anything."""
        self.is_closing = True
        try:
            self._refuse_commands()
            self._end_requests()
        finally:
            try:
                self._on_stop()
            except Exception as error:  # noqa: BLE001 - whoever closes is not kept waiting
                LOGGER.error("the engine's memory was not all given back: %r", error, exc_info=error)
            self.has_ended = True
            # What came after the first time found no end yet; from now on whoever asks refuses it.
            self._refuse_commands()
            self.news.ring()

    def closed_error(self) -> EngineClosed:
        error = EngineClosed("the engine is closed; open a new LLM")
        if self.failure is not None:
            error = EngineClosed(f"the engine stopped: {self.failure!r}; open a new LLM")
            error.__cause__ = self.failure
        return error

    def abort(self, requests: Iterable[Request]) -> None:
        """The engine's thread: end requests; those that have ended stay as they are."""
        for request in requests:
            if request in self.jobs:
                self.engine.abort(request)
                self._report(request)

    def _wait_for_work(self) -> bool:
        """Until there is work, recording ahead after a while; False once the engine is closed."""
        patience = IDLE_SECONDS if self._records_ahead else None
        while not (self.is_closing or self.engine.has_work):
            try:
                self.commands.get(timeout=patience).run()
                patience = IDLE_SECONDS if self._records_ahead else None
            except queue.Empty:
                patience = 0.0 if record_ahead(self.engine.runners.values()) else None
        return not self.is_closing

    def _report(self, request: Request) -> None:
        if request.is_finished:
            self.jobs.pop(request).notify(request)
        else:
            self.jobs[request].notify(request)

    def _end_requests(self) -> None:
        for request in tuple(self.jobs):
            try:
                if self.failure is None:
                    self.abort([request])
                    continue
            except BaseException as error:  # noqa: BLE001 - nothing may keep the others waiting
                self.failure = error
            mailbox = self.jobs.pop(request, None)
            if not request.is_finished:
                request.give_up(self.closed_error())
            if mailbox is not None:
                mailbox.notify(request)

    def _refuse_commands(self) -> None:
        while True:
            try:
                self.commands.get_nowait().refuse(self.closed_error())
            except queue.Empty:
                return


class Submission:
    """Requests on their way to the engine."""

    def __init__(
        self, loop: EngineLoop, requests: list[Request], mailbox: Mailbox, prepare: Callable[[], None]
    ) -> None:
        """`prepare` is called before the requests are added, on the engine's thread."""
        self._loop = loop
        self._requests = requests
        self._mailbox = mailbox
        self._prepare = prepare

    def run(self) -> None:
        try:
            if self._loop.is_draining:
                raise drained()
            self._prepare()
            for request in self._requests:
                self._loop.engine.check_fits(request)
        except BaseException as error:  # noqa: BLE001 - for whoever waits for these requests
            self.refuse(error)
            return
        for request in self._requests:
            self._loop.jobs[request] = self._mailbox
            self._loop.engine.add(request)

    def refuse(self, error: BaseException) -> None:
        """End requests that could not be added; one that a close overtook ends as if it had run."""
        loop = self._loop
        for request in self._requests:
            request.siblings = ()
            if isinstance(error, EngineClosed) and loop.is_closing and loop.failure is None:
                request.finish("abort")
            else:
                request.fail(error)
            self._mailbox.notify(request)


class Order:
    """Something to be done that nobody waits for: an error in it is the engine's own."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def run(self) -> None:
        self._function()

    def refuse(self, error: BaseException) -> None:
        """The end has come to everything."""


def drained() -> EngineClosed:
    """What a request is refused with once the engine drains."""
    return EngineClosed("drain() was called: the engine takes no more requests; open a new LLM")
