"""A submitted job in the caller's hands: stream it, wait for it, cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nudging.errors import EngineClosed
from nudging.output import Delta, RequestOutput, completion_output, segments
from nudging.request import Request

if TYPE_CHECKING:
    from nudging.engine_thread import EngineThread


class Handle:
    """One prompt and its n continuations.  Every method may be called from any thread.

    There is no buffer to overflow: deltas are cut from the text when they are asked for, so a reader who
    never comes costs the text itself, at most max_tokens, and holds nobody up.
    """

    def __init__(self, request_id: str, requests: list[Request], thread: EngineThread) -> None:
        self.request_id = request_id
        self._requests = requests
        self._thread = thread
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        # How many wait for the next piece; who waits for the end is told of nothing before.
        self._readers = 0
        self._ended: set[str] = set()

    @property
    def is_finished(self) -> bool:
        return len(self._ended) == len(self._requests)

    def cancel(self) -> None:
        """End what is not finished yet, with the finish reason "abort"; what was written stays."""
        self._thread.cancel(self._requests)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for all continuations.  Raises TimeoutError after `timeout` seconds; the job goes on."""
        self._thread.check_process()
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_finished, timeout):
                raise TimeoutError(
                    f"request {self.request_id} did not finish within {timeout} s; cancel() ends it"
                )
        for request in self._requests:
            if isinstance(request.error, EngineClosed):
                raise request.error
        outputs = [completion_output(request, i) for i, request in enumerate(self._requests)]
        return RequestOutput(self.request_id, tuple(outputs))

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come, of all continuations; each ends with one whose `finish_reason` is set."""
        self._thread.check_process()
        seen = [0] * len(self._requests)
        open_ones = set(range(len(self._requests)))
        while open_ones:
            with self._changed:
                self._readers += 1
                try:
                    self._changed.wait_for(lambda: any(self._moved(i, seen[i]) for i in open_ones))
                finally:
                    self._readers -= 1
            for i in sorted(open_ones):
                delta = self.take(i, seen[i])
                if delta is None:
                    continue
                seen[i] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    open_ones.discard(i)
                yield delta

    def _moved(self, index: int, seen: int) -> bool:
        request = self._requests[index]
        return len(request.pieces) > seen or request.id in self._ended

    def take(self, index: int, seen: int) -> Delta | None:
        """What continuation `index` has written since its first `seen` tokens; None when nothing moved."""
        request = self._requests[index]
        # The end is read first: a piece that comes between the two reads is then left for the next delta.
        ended = request.id in self._ended
        written = request.pieces
        if len(written) == seen and not ended:
            return None
        pieces = written[seen:]
        author = written[seen - 1].author if seen else "base"
        parts = segments(pieces, request.tail if ended else "", author)
        text = "".join(part.text for part in parts)
        tokens, authors = tuple([p.token for p in pieces]), tuple([p.author for p in pieces])
        return Delta(index, text, tokens, authors, request.finish_reason if ended else None, parts)

    @property
    def num_outputs(self) -> int:
        return len(self._requests)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on the engine's thread, whenever something moved (and once now)."""
        with self._changed:
            if not self.is_finished:
                self._listeners.append(listener)
        listener()

    def notify(self, request: Request) -> None:
        """The engine's side: `request` moved or ended."""
        if not (self._readers or self._listeners or request.is_finished):
            # Who comes to read now looks at the text before it waits.
            return
        with self._changed:
            if request.is_finished:
                self._ended.add(request.id)
            self._changed.notify_all()
            listeners = tuple(self._listeners)
            if self.is_finished:
                # A listener holds the handle, too: what has ended must not wait for the garbage collector.
                self._listeners.clear()
        for listener in listeners:
            listener()
