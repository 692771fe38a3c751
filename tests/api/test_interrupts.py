"""An exception at every instruction of what the main thread does: nothing is left taken, nothing runs on.

An interrupt raises KeyboardInterrupt between any two instructions.  Here it is raised, in turn, at each one
of a call, in our own code and in the parts of the standard library that wait: afterwards the engine has
nothing to do, serves another call as ever, and closes.
"""

import dis
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import nudging
from nudging import Base, Nudging, SamplingParams
from tests.support.simulated import Setup, SimLLM

ENGINE = str(Path(str(nudging.__file__)).parent)
TRACED = (ENGINE, threading.__file__, str(Path(dis.__file__).parent / "contextlib.py"))
ROOMY = Setup(blocks=(9000, 9000), max_len=30000)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=20000, ignore_eos=True)
POLICY = Nudging(0.4, "token")
# Instructions to look at of each call, in the quick suite.
SAMPLE = 60
MOST = 2000
# Guards a hang; a busy machine takes as long as it needs.
PATIENCE = 120
RETURN = dis.opmap["RETURN_VALUE"]


class Interrupt(KeyboardInterrupt):
    """Ours and nobody else's."""


class Interrupted:
    """Runs a call on the main thread and raises at its instruction number `at`; counts those it came to."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.place = ""

    def run(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        gc.disable()
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)
            gc.enable()

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED) or is_finalizer(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and not self._is_over(frame):
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                self.place = f"{frame.f_code.co_qualname}:{frame.f_lineno}, byte {frame.f_lasti}"
                raise Interrupt
        return self._step

    def _is_over(self, frame: FrameType) -> bool:
        """Whether nothing is left to do but to hand the result to the caller, who is interrupted then."""
        last = frame.f_code.co_code[frame.f_lasti] == RETURN
        return last and frame.f_back is not None and frame.f_back.f_code.co_filename == __file__


def is_finalizer(frame: FrameType | None) -> bool:
    """Python drops what is raised there."""
    while frame is not None and frame.f_code.co_name not in ("__del__", "forget"):
        frame = frame.f_back
    return frame is not None


def every(is_slow: bool, count: int) -> Iterator[int]:
    """All instructions, or as many as the quick suite looks at; of a loop that is long by chance not all."""
    yield from range(1, count + 1, max(count // (MOST if is_slow else SAMPLE), 1))


def settled(llm: SimLLM) -> None:
    """All that was asked for is obeyed, and nothing is left to do."""
    llm._thread.call(lambda: None)
    assert not llm._thread.loop.jobs
    assert llm._thread.loop.commands.empty()
    stats = llm.stats()
    assert stats.running == stats.waiting == 0


def expected() -> tuple[int, ...]:
    with SimLLM(ROOMY, threaded=True) as llm:
        return llm.generate([[2, 3]], SHORT, POLICY)[0].outputs[0].token_ids


def submit(llm: SimLLM, kept: list[Any]) -> None:
    kept.append(llm.submit([2, 3], ENDLESS, Base(), "off"))


def submit_all(llm: SimLLM, kept: list[Any]) -> None:
    kept.extend(llm.submit_all([[2, 3], [2, 4]], ENDLESS, Base(), "off"))


def generate(llm: SimLLM, kept: list[Any]) -> None:
    llm.generate([[2, 3], [2, 4]], SHORT, POLICY)


def stream(llm: SimLLM, kept: list[Any]) -> None:
    for _ in llm.stream([2, 3], SHORT, POLICY):
        pass


def leave_a_stream(llm: SimLLM, kept: list[Any]) -> None:
    with llm.stream([2, 3], ENDLESS, POLICY) as deltas:
        next(deltas)


def score(llm: SimLLM, kept: list[Any]) -> None:
    llm.score([2, 3], [4, 5], POLICY)


def extend(llm: SimLLM, kept: list[Any]) -> None:
    with llm.open([2, 3], POLICY) as text:
        text.extend(SHORT)
        text.rewind(1)
        with text.fork() as fork:
            fork.extend(text=[4])


def call(llm: SimLLM, kept: list[Any]) -> None:
    """As `logits` asks for rows."""
    llm._thread.call(lambda: None)


def look(llm: SimLLM, kept: list[Any]) -> None:
    llm.stats()


CALLS = [submit, submit_all, generate, stream, leave_a_stream, score, extend, call, look]
both = pytest.mark.parametrize(
    "is_slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"]
)


def length(use: Callable[[], object]) -> int:
    """About how many instructions a call has; how often it waits is a matter of luck."""
    counter = Interrupted(-1)
    counter.run(use)
    assert counter.count > 10
    return counter.count


@both
@pytest.mark.parametrize("use", CALLS, ids=lambda use: use.__name__)
def test_a_call_that_is_interrupted_leaves_nothing_behind(use: Any, is_slow: bool) -> None:
    text = expected()
    with SimLLM(ROOMY, threaded=True) as llm:
        kept: list[Any] = []
        count = length(lambda: use(llm, kept))
        for at in every(is_slow, count):
            for handle in kept:
                handle.cancel()
            kept.clear()
            interrupted = Interrupted(at)
            with suppress(Interrupt):
                interrupted.run(lambda: use(llm, kept))
            if not kept:
                gc.collect(0)
                settled(llm)
            again = llm.submit([2, 3], SHORT, POLICY).result(timeout=PATIENCE)
            assert again.outputs[0].token_ids == text, interrupted.place
        for handle in kept:
            handle.cancel()


@both
@pytest.mark.parametrize("how", ["result", "iterate"])
def test_who_is_interrupted_while_waiting_may_wait_again(how: str, is_slow: bool) -> None:
    """The job is its caller's and goes on."""
    text = expected()
    with SimLLM(ROOMY, threaded=True) as llm:

        def wait(handle: Any) -> tuple[int, ...]:
            if how == "result":
                return handle.result(timeout=PATIENCE).outputs[0].token_ids
            return tuple(token for delta in handle for token in delta.token_ids)

        count = length(lambda: wait(llm.submit([2, 3], SHORT, POLICY)))
        for at in every(is_slow, count):
            handle = llm.submit([2, 3], SHORT, POLICY)
            interrupted = Interrupted(at)
            with suppress(Interrupt):
                interrupted.run(lambda handle=handle: wait(handle))
            assert wait(handle) == text, interrupted.place
        settled(llm)


@both
@pytest.mark.parametrize("how", ["extend", "score", "rewind", "write"])
def test_an_interrupted_call_leaves_a_text_as_it_was_or_as_it_was_to_be(how: str, is_slow: bool) -> None:
    """Never a half of it, and the next call goes on from there."""
    with SimLLM(ROOMY, threaded=True) as llm:
        uses: dict[str, Callable[[Any], Any]] = {
            "extend": lambda text: text.extend(SHORT),
            "score": lambda text: text.score([4, 5]),
            "rewind": lambda text: text.rewind(1),
            "write": lambda text: text.extend(text=[4, 5]),
        }
        use = uses[how]

        def fresh() -> Any:
            text = llm.open([2, 3], POLICY)
            text.extend(text=[6, 7])
            return text

        with fresh() as text:
            count = length(lambda: use(text))
            done = (text.token_ids, text.authors)
        for at in every(is_slow, count):
            with fresh() as text:
                interrupted = Interrupted(at)
                with suppress(Interrupt):
                    interrupted.run(lambda text=text: use(text))
                now = (text.token_ids, text.authors)
                assert now in (([6, 7], ["caller"] * 2), done), interrupted.place
                if now != done:
                    use(text)
                    assert (text.token_ids, text.authors) == done, interrupted.place
        settled(llm)


@both
@pytest.mark.parametrize("how", ["close", "leave", "drain"])
def test_who_is_interrupted_while_closing_may_close_again(how: str, is_slow: bool) -> None:
    def closed_at(at: int) -> int:
        llm = SimLLM(ROOMY, threaded=True)
        handle = llm.submit([2, 3], SHORT if how == "drain" else ENDLESS, Base(), "off")
        interrupted = Interrupted(at)

        def end() -> None:
            if how == "drain":
                llm.drain()
            if how == "leave":
                with llm:
                    pass
            else:
                llm.close()

        with suppress(Interrupt):
            interrupted.run(end)
        llm.close()
        assert handle.is_finished, interrupted.place
        assert not llm._thread._thread.is_alive(), interrupted.place
        assert llm._engine.runners == {}
        return interrupted.count

    for at in every(is_slow, closed_at(-1)):
        closed_at(at)
