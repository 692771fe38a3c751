"""A submitted job in the caller's hands: stream it, wait for it, cancel it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from nudging.api.outputs import Delta, RequestOutput, logprobs_of, request_output, segments
from nudging.checks import is_int, plain
from nudging.core.guard import tell
from nudging.core.request import Request
from nudging.core.request_options import read_seconds
from nudging.core.waiting import Bell
from nudging.errors import BadRequest, EngineClosed

if TYPE_CHECKING:
    from nudging.core.engine_thread import EngineThread


class Mailbox:
    """Where the engine leaves word of one job.  It knows no engine: the engine's thread holds it."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.ended: set[str] = set()
        # Rung for readers that wait for the next piece, and for those that wait for the end alone.
        self.moved, self.over = Bell(), Bell()
        self.listeners: list[Callable[[], object]] = []

    @property
    def is_finished(self) -> bool:
        return len(self.ended) == len(self.requests)

    def has_moved(self, index: int, seen: int) -> bool:
        """Whether continuation `index` has ended or more than `seen` tokens."""
        request = self.requests[index]
        return len(request.pieces) > seen or request.id in self.ended

    def notify(self, request: Request) -> None:
        """The engine's side: `request` moved or ended."""
        if request.is_finished:
            self.ended.add(request.id)
        elif self.moved.is_awaited or self.listeners:
            request.read_carried()
        else:
            # A reader that comes now looks at the text before it waits.
            return
        self.moved.ring()
        listeners = tuple(self.listeners)
        if self.is_finished:
            self.over.ring()
            # A listener holds the handle, too: what has ended must not wait for the garbage collector.
            self.listeners.clear()
        tell(listeners)


class Handle:
    """One prompt and its n continuations.  Every method may be called from any thread.

    There is no buffer to overflow: deltas are cut from the text when they are asked for, so a reader who
    never comes costs the text itself, at most max_tokens, and holds nobody up.
    """

    def __init__(self, request_id: str, requests: list[Request], thread: EngineThread) -> None:
        self.request_id = request_id
        self.mailbox = Mailbox(requests)
        self._requests = requests
        self._thread = thread

    @property
    def is_finished(self) -> bool:
        return self.mailbox.is_finished

    def cancel(self) -> None:
        """End what is not finished yet, with the finish reason "abort"; what was written stays."""
        if not self.is_finished:
            self._thread.cancel(self._requests)

    def abandon(self) -> None:
        """Cancel it where this process runs it: its owner is gone.  Callable from a finalizer."""
        if not self._thread.is_forked:
            self.cancel()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for all continuations.  Raises TimeoutError after `timeout` seconds; the job goes on.

        Raises BadRequest on the engine's own thread, in a policy or a listener, where the job is not
        finished yet.
        """
        timeout = read_seconds("timeout", timeout)
        self._thread.check_process()
        if not self.is_finished:
            self._thread.check_may_wait("result()")
            if not self.mailbox.over.wait_for(lambda: self.is_finished, timeout):
                raise TimeoutError(
                    f"request {self.request_id} did not finish within {timeout} s; cancel() ends it"
                )
        for request in self._requests:
            if isinstance(request.error, EngineClosed):
                raise request.error
        return request_output(self.request_id, self._requests)

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come, of all continuations; each ends with one whose `finish_reason` is set."""
        self._thread.check_process()
        seen = [0] * len(self._requests)
        open_ones = set(range(len(self._requests)))
        mailbox = self.mailbox
        while open_ones:
            if not any(mailbox.has_moved(i, seen[i]) for i in open_ones):
                self._thread.check_may_wait("reading a stream")
                mailbox.moved.wait_for(lambda: any(mailbox.has_moved(i, seen[i]) for i in open_ones))
            for i in sorted(open_ones):
                delta = self.take(i, seen[i])
                if delta is None:
                    continue
                seen[i] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    open_ones.discard(i)
                yield delta

    def take(self, index: int, seen: int) -> Delta | None:
        """What continuation `index` has written since its first `seen` tokens; None when nothing moved.

        A reader that does not wait may be some tokens behind; waiting readers and listeners hear of each.
        Raises BadRequest for a continuation that is not there, and for more tokens than it has.
        """
        request = self._requests[_read("index", index, len(self._requests) - 1, "the last continuation")]
        # The end is read first: a piece that comes between the two reads is then left for the next delta.
        ended = request.id in self.mailbox.ended
        written = request.pieces
        seen = _read("seen", seen, len(written), "the number of tokens it has")
        if len(written) == seen and not ended:
            return None
        pieces = written[seen:]
        author = written[seen - 1].author if seen else "base"
        parts = segments(pieces, request.tail if ended else "", author)
        text = "".join(part.text for part in parts)
        tokens, authors = tuple([p.token for p in pieces]), tuple([p.author for p in pieces])
        logprobs = logprobs_of(request, pieces)
        if not ended:
            return Delta(index, text, tokens, authors, None, parts, logprobs)
        end = request.finish_reason, parts, logprobs, request.error, request.stop_reason
        return Delta(index, text, tokens, authors, *end)

    @property
    def num_outputs(self) -> int:
        return len(self._requests)

    def add_listener(self, listener: Callable[[], object]) -> None:
        """Call `listener`, on the engine's thread, whenever something moved (and once now, on this one).

        What it raises there goes to the log `nudging`; what it raises now is raised, and it is not added.
        Raises BadRequest for what cannot be called.
        """
        if not callable(listener):
            raise BadRequest(f"listener is {listener!r}; give a callable that takes no argument")
        self.mailbox.listeners.append(listener)
        try:
            listener()
        except BaseException:
            if listener in self.mailbox.listeners:
                self.mailbox.listeners.remove(listener)
            raise
        if self.is_finished:
            self.mailbox.listeners.clear()


def _read(name: str, value: Any, limit: int, what: str) -> int:
    """A whole number from 0 to `limit`, which is `what`.  Raises BadRequest."""
    number = value if type(value) is int else plain(value)
    if not is_int(number) or not 0 <= number <= limit:
        raise BadRequest(f"{name} is {value!r}; it must be a whole number from 0 to {limit}, {what}")
    return int(number)


class Owned(list[Handle]):
    """The handles of one call, which nobody else has: left by an exception, it cancels them.

    Where they are handed on at its end, it says so with `except`: what leaves a `with` block is no longer
    covered by it.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self.cancel()

    def cancel(self) -> None:
        """Cancel all that is not finished yet."""
        for handle in self:
            handle.abandon()

    def results(self) -> list[RequestOutput]:
        """What all of them come to, in order."""
        return [handle.result() for handle in self]


class Stream(Iterator[Delta]):
    """A job's deltas, read by one who owns it: closing it, leaving it by an exception and dropping it cancel
    what is not written yet.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._deltas = iter(handle)

    @property
    def handle(self) -> Handle:
        """The job's; its `result()` is the whole text."""
        return self._handle

    @property
    def request_id(self) -> str:
        """The job's id, for `LLM.abort`."""
        return self._handle.request_id

    def cancel(self) -> None:
        """End the text here, with the finish reason "abort"; the deltas up to there still come."""
        self._handle.cancel()

    def __next__(self) -> Delta:
        try:
            return next(self._deltas)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # An interrupt may have come before there was a handle.
        handle = getattr(self, "_handle", None)
        if handle is not None:
            handle.abandon()

    def close(self) -> None:
        """Cancel what is not finished yet; the stream ends."""
        self._deltas = iter(())
        self._handle.cancel()
