"""A timeline of an engine's steps, in the format that Perfetto and chrome://tracing open."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

Details = Callable[[], Mapping[str, Any]]
# What `Tracer.span` gives where nothing is traced: entering it costs nothing that could be measured.
UNTRACED: AbstractContextManager[None] = contextlib.nullcontext()


class Tracer:
    """What an engine tells about its time.  This one forgets it; `Trace` writes it down."""

    def span(self, track: str, name: str, details: Details = dict) -> AbstractContextManager[None]:
        """Encloses one part of the work: `track` is the line it is drawn on; `details()`, asked for only
        where somebody listens, is shown with it.
        """
        return UNTRACED

    def begin(self, request: str, **details: Any) -> None:
        """A request came."""

    def end(self, request: str, **details: Any) -> None:
        """A request ended."""

    def level(self, name: str, **values: float) -> None:
        """How much of something there is now, drawn as a curve."""

    def close(self) -> None:
        """Nothing comes any more."""


class Trace(Tracer):
    """Writes every event as it comes, so that the file can be opened even where the process was killed.

    The format is the Trace Event Format's JSON array; times are microseconds since the trace was opened.
    """

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.perf_counter) -> None:
        """`file` is written to and closed by `close`."""
        self._file = file
        self._clock = clock
        self._began = clock()
        self._tracks: dict[str, int] = {}
        # Requests are announced by the callers' threads, everything else by the engine's.
        self._lock = threading.Lock()
        self._file.write("[")
        self._first = True

    @contextlib.contextmanager
    def span(self, track: str, name: str, details: Details = dict) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            took = round(self._now() - began, 3)
            self._write(ph="X", name=name, tid=self._track(track), ts=began, dur=took, args=details())

    def begin(self, request: str, **details: Any) -> None:
        self._write(ph="b", cat="request", name="request", id=request, ts=self._now(), args=details)

    def end(self, request: str, **details: Any) -> None:
        self._write(ph="e", cat="request", name="request", id=request, ts=self._now(), args=details)

    def level(self, name: str, **values: float) -> None:
        self._write(ph="C", name=name, ts=self._now(), args=values)

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write("\n]\n")
                self._file.close()

    def _now(self) -> float:
        return round(1e6 * (self._clock() - self._began), 3)

    def _track(self, name: str) -> int:
        """The number of a track; its name is written when it is first used."""
        if name not in self._tracks:
            self._tracks[name] = len(self._tracks)
            self._write(ph="M", name="thread_name", tid=self._tracks[name], args={"name": name})
        return self._tracks[name]

    def _write(self, **event: Any) -> None:
        line = json.dumps({"pid": 0, **event})
        with self._lock:
            if self._file.closed:
                return
            self._file.write(("\n" if self._first else ",\n") + line)
            self._first = False
