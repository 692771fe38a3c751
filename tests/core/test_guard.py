"""What runs for one request, listener or policy costs nobody else anything, whatever it raises or returns."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from nudging import BadRequest, Base, EngineClosed, SamplingParams
from nudging.core.request import Request
from nudging.policies.protocol import Step, View
from tests.support.simulated import Setup, SimLLM

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
RAISED = [
    RuntimeError("no"),
    MemoryError("no"),
    StopIteration("no"),
    KeyboardInterrupt("no"),
    SystemExit(3),
    GeneratorExit("no"),
    BaseException("no"),
]
# Guards a hang; a busy machine takes as long as it needs.
PATIENCE = 120


@dataclass(frozen=True)
class Own:
    """A caller's own policy: two tokens of the base, then what `does` says."""

    does: Callable[[View, Any], Any]

    roles: ClassVar[tuple[str, ...]] = ("base",)
    lookahead: ClassVar[int] = 0
    shares_ids: ClassVar[bool] = True
    needs_tokenizer: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    def start(self) -> int:
        return 0

    def step(self, view: View, state: int) -> Any:
        row = view.row("base")
        return Step((row.token,), "base", state=state + 1) if state < 2 else self.does(view, row)


@pytest.fixture
def llm() -> Iterator[SimLLM]:
    with SimLLM(Setup(), threaded=True) as llm:
        yield llm


def expected() -> tuple[int, ...]:
    with SimLLM(Setup(), threaded=True) as llm:
        return llm.generate([[2, 3]], PARAMS, Base(), "off")[0].outputs[0].token_ids


def assert_serves(llm: SimLLM) -> None:
    """It writes what it always wrote, and holds nothing of what went wrong."""
    result = llm.submit([2, 3], PARAMS, Base(), "off").result(timeout=PATIENCE)
    assert result.outputs[0].token_ids == expected()
    assert llm.stats().running == llm.stats().waiting == 0


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*_: object) -> Any:
        raise error

    return function


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_what_a_policy_raises_ends_its_own_request(llm: SimLLM, error: BaseException) -> None:
    other = llm.submit([2, 3], PARAMS, Base(), "off")
    output = llm.submit([4, 5], PARAMS, Own(raises(error))).result(timeout=PATIENCE).outputs[0]
    assert (output.finish_reason, output.error, len(output.token_ids)) == ("error", error, 2)
    assert other.result(timeout=PATIENCE).outputs[0].token_ids == expected()
    assert_serves(llm)


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_what_a_policy_raises_interrupts_nobody_who_extends(llm: SimLLM, error: BaseException) -> None:
    """A KeyboardInterrupt of a policy is not one of the caller, nor is its StopIteration an end of theirs."""
    with llm.open([4, 5], Own(raises(error))) as text:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the point
            text.extend(PARAMS)
        assert error in (caught.value, caught.value.__cause__)
        assert not isinstance(caught.value, StopIteration)
        assert text.token_ids == []
    assert_serves(llm)


SAYS: list[tuple[Any, str]] = [
    (Step((5,), finish="done"), "finished with 'done'; finish is None, 'stop' or 'length'"),
    (Step((5,), "nobody"), "wrote as 'nobody'; it may write as 'base'"),
    (Step((5,), "guide"), "wrote as 'guide'; it may write as 'base'"),
    (Step(texts=(("nobody", "x"),)), r"wrote \('nobody', 'x'\); a text is \(author, text\)"),
    (Step(texts=(("base", b"x"),)), r"wrote \('base', b'x'\)"),
    (Step(texts="ab"), "wrote texts 'ab'"),
    (
        Step((5,), "base", texts=(("base", "x"),)),
        r"wrote tokens \(5,\) and texts \(\('base', 'x'\),\); give one of them",
    ),
    (Step(texts=(("base", "\ud800"),)), "a text is"),
    (Step((5.0,)), r"wrote token 5\.0; ids go from 0 to"),
    (Step((True,)), "wrote token True"),
    (Step(("5",)), "wrote token '5'"),
    (Step(5), "wrote tokens 5; give a tuple"),
    (Step((-1,)), "wrote token -1"),
    (None, "returned a NoneType; return Step"),
    ((5, "base"), "returned a tuple; return Step"),
    (Step(state=2), "it stands still"),
]


@pytest.mark.parametrize(("says", "message"), SAYS, ids=[str(says) for says, _ in SAYS])
def test_nonsense_from_a_policy_is_not_believed(llm: SimLLM, says: Any, message: str) -> None:
    output = llm.submit([4, 5], PARAMS, Own(lambda view, row: says)).result(timeout=PATIENCE).outputs[0]
    assert isinstance(output.error, BadRequest)
    with pytest.raises(BadRequest, match=message):
        raise output.error
    assert len(output.token_ids) == 2, "nothing of it is written"
    assert_serves(llm)


@dataclass(frozen=True)
class Counts(Own):
    """A policy that only ever changes its state."""

    def step(self, view: View, state: int) -> Any:
        return Step(state=state + 1)


def test_a_policy_that_stands_still_in_ever_new_states_holds_nobody_up(llm: SimLLM) -> None:
    counting, other = llm.submit([4, 5], PARAMS, Counts(print)), llm.submit([2, 3], PARAMS, Base(), "off")
    assert other.result(timeout=PATIENCE).outputs[0].token_ids == expected()
    with pytest.raises(BadRequest, match="changed its state 1001 times, wrote nothing"):
        raise counting.result(timeout=PATIENCE).outputs[0].error or AssertionError
    assert_serves(llm)


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        (lambda view, row: view.row("nobody"), "asks 'nobody', which is none of its roles; those are 'base'"),
        (lambda view, row: view.rollout("nobody", 2), "asks 'nobody'"),
        (lambda view, row: view.rollout("base", -1), "asks for -1 tokens"),
        (lambda view, row: view.complete("base", " a", -1), "asks for -1 tokens"),
        (lambda view, row: view.complete("base", " a", 1.5), "asks for 1.5 tokens"),
        (lambda view, row: view.pick("abc"), "picks from 'abc'; give one row of logits"),
    ],
)
def test_what_no_policy_can_ask_is_named(llm: SimLLM, asks: Any, message: str) -> None:
    output = llm.submit([4, 5], PARAMS, Own(asks)).result(timeout=PATIENCE).outputs[0]
    with pytest.raises(BadRequest, match=message):
        raise output.error or AssertionError
    assert_serves(llm)


def test_a_policy_may_write_what_counts_as_an_id(llm: SimLLM) -> None:
    numpy = pytest.importorskip("numpy")
    policy = Own(lambda view, row: Step([numpy.int64(row.token)], state=2))
    output = llm.submit([2, 3], PARAMS, policy).result(timeout=PATIENCE).outputs[0]
    assert output.token_ids == expected()
    assert all(type(token) is int for token in output.token_ids)


@pytest.mark.parametrize("reads", [lambda view, row: row.logits, lambda view, row: view.pick(row.logits)])
def test_logits_nobody_asked_for_are_named(llm: SimLLM, reads: Any) -> None:
    output = llm.submit([4, 5], PARAMS, Own(reads)).result(timeout=PATIENCE).outputs[0]
    with pytest.raises(BadRequest, match=r"row\.logits .* needs_logits = True"):
        raise output.error or AssertionError("it was served")
    assert_serves(llm)


def test_a_policy_whose_name_cannot_be_said_is_refused_where_it_is_given(llm: SimLLM) -> None:
    class Nameless(Own):
        __repr__ = raises(KeyError("no name"))

    with pytest.raises(KeyError, match="no name"):
        llm.submit([4, 5], PARAMS, Nameless(lambda view, row: None))
    assert_serves(llm)


@pytest.mark.parametrize("name", ["roles", "lookahead", "shares_ids", "needs_logits", "__repr__"])
def test_what_a_policy_says_of_itself_is_asked_on_its_callers_thread(llm: SimLLM, name: str) -> None:
    """These may be properties, and do anything."""

    def here(policy: Any) -> Any:
        assert not llm._thread.is_current
        return "Asked()" if name == "__repr__" else getattr(Own, name)

    member = here if name == "__repr__" else property(here)
    policy = type("Asked", (Own,), {name: member})(lambda view, row: Step((row.token,), state=2))
    output = llm.submit([2, 3], PARAMS, policy).result(timeout=PATIENCE).outputs[0]
    assert (output.error, output.token_ids) == (None, expected())


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_what_a_listener_raises_is_told_and_stops_nobody(
    llm: SimLLM, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    llm.on_end(raises(error))
    llm.on_end(lambda request: told.append(request.id))
    handles = [llm.submit([2, token], PARAMS, Base(), "off") for token in (3, 4)]
    is_armed = threading.Event()

    def listener() -> None:
        if is_armed.is_set():
            raise error

    handles[0].add_listener(listener)
    is_armed.set()
    ended = [handle.result(timeout=PATIENCE).outputs[0].finish_reason for handle in handles]
    assert ended == ["length"] * 2
    assert_serves(llm)
    assert len(told) == 3
    records = [record for record in caplog.records if record.name == "nudging"]
    assert records
    assert all(record.levelno == logging.ERROR for record in records)
    assert all(record.exc_info is not None and record.exc_info[1] is error for record in records)


def test_a_listener_that_raises_at_once_is_not_added(llm: SimLLM) -> None:
    handle = llm.submit([2, 3], PARAMS, Base(), "off")
    with pytest.raises(ZeroDivisionError):
        handle.add_listener(lambda: 1 // 0)
    assert handle.mailbox.listeners == []
    handle.result(timeout=PATIENCE)
    assert_serves(llm)


@pytest.mark.parametrize("where", ["step", "on_end", "listener"])
def test_waiting_for_the_engine_on_its_own_thread_is_refused_at_once(where: str) -> None:
    """In a policy's step or a listener; it would wait for itself, for ever."""
    with SimLLM(Setup(blocks=(9000, 9000), max_len=20000), threaded=True) as llm:
        running = llm.submit([2, 7], SamplingParams(max_tokens=15000, ignore_eos=True), Base(), "off")
        text = llm.open([2, 3], Base())
        uses: list[Callable[[], Any]] = [
            lambda: llm.generate([[2, 3]], PARAMS),
            lambda: llm.score([2, 3], [4], Base()),
            lambda: next(llm.stream([2, 3], PARAMS)),
            lambda: text.extend(PARAMS),
            lambda: text.score([4]),
            llm.drain,
            running.result,
            lambda: running.result(timeout=1000.0),
            lambda: list(running),
        ]
        if where != "step":
            uses.append(lambda: llm.chat([{"role": "user", "content": "a"}], PARAMS))
        said: list[Any] = []

        def use(*_: object) -> Any:
            if said or not llm._thread.is_current:
                return None
            for one in uses:
                try:
                    said.append(one())
                except BaseException as error:
                    said.append(error)
            return None

        if where == "on_end":
            llm.on_end(use)
        policy = Own(use) if where == "step" else Base()
        handle = llm.submit([4, 5], PARAMS, policy)
        if where == "listener":
            handle.add_listener(use)
        handle.result(timeout=PATIENCE)
        while len(said) < len(uses):
            threading.Event().wait(0.001)
        assert all(isinstance(error, BadRequest) for error in said), said
        assert all("on the engine's own thread" in str(error) for error in said)
        text.close()
        running.cancel()
        running.result(timeout=PATIENCE)
        assert_serves(llm)


def test_closing_from_a_listener_ends_what_runs_and_breaks_nothing() -> None:
    llm = SimLLM(Setup(blocks=(4000, 4000), max_len=4096), threaded=True)
    llm.on_end(lambda request: llm.close())
    long = llm.submit([2, 3], SamplingParams(max_tokens=3000, ignore_eos=True), Base(), "off")
    short = llm.submit([2, 4], PARAMS, Base(), "off")
    assert short.result(timeout=PATIENCE).outputs[0].finish_reason == "length"
    output = long.result(timeout=PATIENCE).outputs[0]
    assert (output.finish_reason, output.error) == ("abort", None)
    llm.close()
    assert not llm._thread._thread.is_alive()
    assert llm._engine.runners == {}


@pytest.mark.parametrize("place", ["retire", "report", "step"])
def test_when_the_engine_ends_everybody_hears_why(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also whose request was just ending: it runs no more and has not been told yet."""
    llm = SimLLM(Setup(blocks=(4000, 4000), max_len=4096), threaded=True)
    engine, loop = llm._engine, llm._thread.loop
    owner, name = {
        "retire": (engine._tracer, "end"),
        "report": (loop, "_report"),
        "step": (engine.fast_path, "settle"),
    }[place]
    gate, original = threading.Event(), getattr(owner, name)

    def breaks(*arguments: Any, **options: Any) -> Any:
        if gate.is_set():
            raise RuntimeError("out of luck")
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, breaks)
    long = SamplingParams(max_tokens=3000, ignore_eos=True)
    handles = [llm.submit([2, token], long, Base(), "off") for token in (3, 4)]
    stream = iter(handles[0])
    next(stream)
    gate.set()
    if place == "retire":
        handles.append(llm.submit([2, 5], PARAMS, Base(), "off"))
    if place == "retire":
        # What had ended by itself is what it is.
        ending = handles.pop()
        assert ending.result(timeout=PATIENCE).outputs[0].finish_reason == "length"
    for handle in handles:
        with pytest.raises(EngineClosed, match=r"the engine stopped: RuntimeError\('out of luck'\)"):
            handle.result(timeout=PATIENCE)
    assert [delta.finish_reason for delta in stream][-1] == "error"
    with pytest.raises(EngineClosed, match="the engine stopped"):
        llm.submit([2, 3], PARAMS)
    llm.close()
    assert not llm._thread._thread.is_alive()


def test_a_request_whose_state_is_lost_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine breaks with a request in C++ that cannot be taken back."""
    llm = SimLLM(Setup(blocks=(4000, 4000), max_len=4096), threaded=True)
    handle = llm.submit([2, 3], SamplingParams(max_tokens=3000, ignore_eos=True), Base(), "off")
    request = handle._requests[0]
    while not request.is_carried:
        next(iter(handle))
    monkeypatch.setattr(Request, "bring_back", raises(RuntimeError("lost")))
    monkeypatch.setattr(llm._engine.fast_path, "settle", raises(RuntimeError("out of luck")))
    with pytest.raises(EngineClosed, match="out of luck"):
        handle.result(timeout=PATIENCE)
    llm.close()
