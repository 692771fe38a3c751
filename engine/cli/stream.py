"""Lines stream through the engine: read, started and written in order, all at the same time.

One thread reads, the engine's thread writes texts, and the main one does what is told to it by a queue: a
line has come, a text has ended, somebody wants an end.  So nobody waits for the end of the input, input of
any length takes a bounded memory, and no signal comes in the midst of anything.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nudging.cli.input import Ask, BadLine, read_line
from nudging.cli.signals import Interrupted, Signals
from nudging.errors import BadRequest

if TYPE_CHECKING:
    from nudging.api.handle import Handle
    from nudging.cli.output import Writer
    from nudging.cli.progress import Meter
    from nudging.core.sampling_params import SamplingParams

# So many prompts are in the engine at once; the first ones only FIRST, so that the first texts come soon.
WINDOW, FIRST = 256, 32
# So many more may have ended while an earlier one is still being written.
HELD = 2048


@dataclass
class Job:
    """A line of the input on its way."""

    id: str | int | None
    handle: Handle | BadRequest
    has_ended: bool = False


class Stream:
    """The lines of one run."""

    def __init__(
        self,
        lines: Iterator[bytes],
        params: SamplingParams,
        submit: Callable[[Ask], Handle],
        writer: Writer,
        meter: Meter,
        first: int = 0,
    ) -> None:
        """`lines`: from number `first` on.  `params`: of a line that has none of its own.  `submit` starts
        what a line asks for.
        """
        self._lines = lines
        self._params = params
        self._submit = submit
        self._writer = writer
        self._meter = meter
        # Called in this order by the main thread, which alone changes what is here.
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._allowed = self._begun = self._written = first
        self._num_ended = self._first = first
        self._all_read = False
        # How many lines may be read now.
        self._slots = threading.Semaphore(0)
        self._stopped = False

    @property
    def num_written(self) -> int:
        """How many lines of the input have their answer."""
        return self._written

    def run(self) -> None:
        """Until all is written.  Raises Interrupted, what reading or writing raises, and EngineClosed."""
        reader = threading.Thread(target=self._read, name="nudging-input", daemon=True)
        with Signals(lambda number: self._events.put(lambda: self._interrupt(number))):
            reader.start()
            try:
                while not (self._all_read and self._written == self._begun):
                    self._allow()
                    self._next_event()()
            finally:
                self._stopped = True
                self._slots.release()

    def _next_event(self) -> Callable[[], None]:
        """What has happened; meanwhile the meter goes on."""
        while True:
            try:
                return self._events.get(timeout=self._meter.refresh())
            except queue.Empty:
                continue

    def _read(self) -> None:
        """The reading thread: a line for each slot."""
        try:
            for line in self._lines:
                self._slots.acquire()
                if self._stopped:
                    return
                self._events.put(lambda line=line: self._start(line))  # type: ignore[misc]
        except Exception as error:
            # The main thread's to raise.
            self._events.put(lambda error=error: self._fail(error))  # type: ignore[misc]
        else:
            self._events.put(self._end)

    def _allow(self) -> None:
        """Let as many lines be read as there is room for."""
        window = min(FIRST + self._num_ended - self._first, WINDOW)
        room = min(self._num_ended + window, self._written + HELD) - self._allowed
        if room > 0:
            self._allowed += room
            self._slots.release(room)

    def _start(self, line: bytes) -> None:
        """Hand a line to the engine; one that it refuses has ended."""
        index = self._begun
        self._begun += 1
        own_id = None
        try:
            ask = read_line(line, self._params)
            own_id = ask.id
            handle = self._submit(ask)
        except BadRequest as error:
            self._jobs[index] = Job(error.id if isinstance(error, BadLine) else own_id, error)
            self._ended(index)
            return
        self._jobs[index] = Job(own_id, handle)
        self._meter.begin(handle)
        handle.add_listener(lambda: self._look(index, handle))

    def _look(self, index: int, handle: Handle) -> None:
        """The engine's thread: something of the job has moved."""
        if handle.is_finished:
            self._events.put(lambda: self._ended(index))

    def _ended(self, index: int) -> None:
        """Write what has ended and has nothing before it that has not."""
        job = self._jobs.get(index)
        if job is None or job.has_ended:
            return
        job.has_ended = True
        self._num_ended += 1
        if not isinstance(job.handle, BadRequest):
            self._meter.end(job.handle)
        while (ready := self._jobs.get(self._written)) is not None and ready.has_ended:
            result = ready.handle if isinstance(ready.handle, BadRequest) else ready.handle.result()
            self._writer.write(self._written, ready.id, result)
            del self._jobs[self._written]
            self._written += 1

    def _end(self) -> None:
        self._all_read = True

    def _fail(self, error: Exception) -> None:
        raise error

    def _interrupt(self, number: int) -> None:
        raise Interrupted(number)
