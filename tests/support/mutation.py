"""Does a test notice when the host half is changed?

`python -m tests.support.mutation` plants one change at a time and counts those that the simulation and the
host half's quick tests notice.

A mutant is one changed node in a function's body, put in place of the function's code in a forked process:
all else is warm.  Only what runs the changed lines is asked, the quickest first, until one notices.
`python -m tests.support.mutation_cpp` does it to the half that is written in C++.
"""

import argparse
import ast
import copy
import gc
import importlib
import json
import os
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import coverage
import pytest
from _pytest.runner import runtestprotocol

MODULES = (
    "core.speculation.ledger", "core.block_pool", "core.claims", "core.coscheduling",
    "core.speculation.pass_costs", "text.detokenizer", "core.speculation.drafting",
    "core.speculation.drafters", "core.engine", "core.engine_loop", "core.engine_thread", "api.generation",
    "api.handle", "core.fast_path", "api.outputs", "core.prefix_cache", "core.ranked", "core.request",
    "core.scheduler", "core.sequence", "core.stats", "core.policy_view",
)  # fmt: skip
TESTS = (
    "simulation", "admission", "faults", "scheduler", "cosched", "prefix_cache", "blocks", "adaptive",
    "ledger", "drafting", "engine", "view", "request", "output", "handle", "open_text", "generation",
    "lifecycle", "detokenize", "sharing",
)  # fmt: skip
LIVES = 30
# Tests that repeat what lives do, at length, and those that write checkpoints first.
LONG = ("test_twenty_thousand_turns", "test_a_planted_fault", "test_drafts_", "any_two_of_three")
SLOW_FIXTURE = "tiny_pair"
# CPU seconds of a mutant in a check, beyond five times what the check takes.
SLACK_SECONDS = 2.0
# One that takes less of the CPU in so many seconds of the wall waits for ever.
STILL_SECONDS, STILL_CPU_SECONDS = 90, 0.02
BROKEN, STILL = 3, 4

COMPARES = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    other = copy.deepcopy(node)
    if isinstance(other, ast.Compare) and type(other.ops[0]) in COMPARES:
        other.ops[0] = COMPARES[type(other.ops[0])]()
        yield other
    elif isinstance(other, ast.BinOp | ast.AugAssign) and type(other.op) in OPERATORS:
        other.op = OPERATORS[type(other.op)]()
        yield other
    elif isinstance(other, ast.BoolOp):
        other.op = ast.And() if isinstance(other.op, ast.Or) else ast.Or()
        yield other
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not):
        yield other.operand
    elif isinstance(other, ast.Constant) and isinstance(other.value, bool):
        yield ast.Constant(not other.value)
    elif isinstance(other, ast.Constant) and isinstance(other.value, int):
        yield ast.Constant(other.value + 1)
    elif isinstance(other, ast.If | ast.While | ast.IfExp):
        other.test = ast.UnaryOp(ast.Not(), other.test)
        yield other
    elif isinstance(other, ast.Expr) and isinstance(other.value, ast.Call):
        yield ast.Pass()
    elif isinstance(other, ast.Continue | ast.Break):
        yield ast.Break() if isinstance(other, ast.Continue) else ast.Continue()
    elif isinstance(other, ast.Return) and not isinstance(other.value, ast.Constant | types.NoneType):
        yield ast.Return(ast.Constant(None))


def is_skipped(node: ast.AST) -> bool:
    """Assertions, messages and the tracer decide nothing; without its `super()` code fits no method."""
    if isinstance(node, ast.Assert | ast.Raise | ast.JoinedStr):
        return True
    text = ast.unparse(node) if isinstance(node, ast.Expr | ast.withitem) else ""
    return "_tracer" in text or text.startswith("super()")


def fields(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below: its parent, field and place there."""
    for name, value in ast.iter_fields(node):
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not is_skipped(child) and name not in ("annotation", "returns"):
                yield node, name, place, child
                yield from fields(child)


class Mutant(NamedTuple):
    """What is changed, what puts it in place, and the lines of its statement."""

    what: str
    plant: Callable[[], None]
    lines: frozenset[int]


class Half(Protocol):
    """The code that is changed."""

    modules: tuple[str, ...]

    def mutants(self, name: str) -> Iterator[Mutant]:
        """Every mutant of a module."""

    def record(self) -> Callable[[], dict[str, list[int]]]:
        """From now on note which lines run; what is returned tells those of each module."""


class PythonHalf:
    """The modules written in Python."""

    modules = MODULES

    def mutants(self, name: str) -> Iterator[Mutant]:
        return mutants(name, ast.parse(Path(path_of(name)).read_text()))

    def record(self) -> Callable[[], dict[str, list[int]]]:
        paths = {name: path_of(name) for name in self.modules}
        recorder = coverage.Coverage(data_file=None, config_file=False, include=list(paths.values()))
        recorder.start()

        def lines() -> dict[str, list[int]]:
            recorder.stop()
            data = recorder.get_data()
            return {name: sorted(data.lines(path) or ()) for name, path in paths.items()}

        return lines


def mutants(module: str, tree: ast.Module) -> Iterator[Mutant]:
    """Every mutant of a module."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for parent, name, place, child in fields(function):
            for other in mutated(child):
                ast.copy_location(other, child)
                _put(parent, name, place, other)
                what = (
                    f"{function.name}, line {getattr(child, 'lineno', 0)}: {_shown(child)} -> {_shown(other)}"
                )
                changed = ast.fix_missing_locations(copy.deepcopy(tree))
                _put(parent, name, place, child)
                yield Mutant(what, partial(install, module, changed), statement_lines(function, child))


def statement_lines(function: ast.FunctionDef, node: ast.AST) -> frozenset[int]:
    """The lines of the innermost statement around a node; of a compound one, its head's.  A default value
    counts where its function runs.
    """
    around = [
        s for s in ast.walk(function) if isinstance(s, ast.stmt) and any(n is node for n in ast.walk(s))
    ]
    statement = around[-1]
    first, last = statement.lineno, statement.end_lineno or statement.lineno
    body = getattr(statement, "body", None)
    if isinstance(body, list) and body and statement is not function:
        last = max(body[0].lineno - 1, first)
    return frozenset(range(first, last + 1))


def _put(parent: ast.AST, name: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[place] = node


def _shown(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:60]


def path_of(name: str) -> str:
    return str(importlib.import_module(f"nudging.{name}").__file__)


def install(name: str, tree: ast.Module) -> None:
    """Give the loaded module's functions the code of the changed ones: all who hold them get it."""
    module = importlib.import_module(f"nudging.{name}")
    fresh = types.ModuleType(module.__name__)
    fresh.__dict__.update(__file__=module.__file__, __name__=module.__name__)
    exec(compile(tree, str(module.__file__), "exec"), fresh.__dict__)
    _take_code(module, fresh)


def _take_code(old: Any, new: Any) -> None:
    for key, value in vars(new).items():
        have = vars(old).get(key)
        for inner in ("", "fget", "__func__"):
            a, b = (getattr(one, inner, None) if inner else one for one in (have, value))
            if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
                a.__code__, a.__defaults__ = b.__code__, b.__defaults__
        if isinstance(have, type) and isinstance(value, type) and have.__module__ == value.__module__:
            _take_code(have, value)


class Check(NamedTuple):
    """Something that may notice a mutant: `holds` returns whether all is well."""

    name: str
    holds: Callable[[], bool]
    seconds: float
    # The lines of each module it runs.
    lines: dict[str, frozenset[int]]


def timed(half: Half, name: str, holds: Callable[[], bool], most: float) -> Callable[[], Check | None]:
    """A check with what it takes and reaches, tried in a process of its own: this one stays without threads,
    which do not come along into forked ones.  It is begun now and waited for by who calls what is returned:
    None for a check that takes more than `most` CPU seconds.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, most)
            lines = half.record()
            began = time.process_time()
            assert holds()
            seconds = time.process_time() - began
            os.write(writer, json.dumps([seconds, lines()]).encode())
        finally:
            os._exit(0)
    os.close(writer)

    def answer() -> Check | None:
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == -signal.SIGPROF:
            return None
        assert told, f"{name} fails without a mutant"
        seconds, lines = json.loads(told)
        return Check(name, holds, seconds, {module: frozenset(found) for module, found in lines.items()})

    return answer


def all_timed(
    half: Half, named: list[tuple[str, Callable[[], bool]]], options: argparse.Namespace
) -> list[Check]:
    """The quick checks among those named, the quickest first; `jobs` of them are timed at once."""
    checks: list[Check] = []
    for first in range(0, len(named), options.jobs):
        begun = [timed(half, *one, options.seconds) for one in named[first : first + options.jobs]]
        checks += [check for answer in begun if (check := answer()) is not None]
    return sorted(checks, key=lambda check: check.seconds)


def lives(seed: int) -> Callable[[], bool]:
    # Not before the half that is changed has taken its place.
    from tests.support.simulation import live

    def holds() -> bool:
        live(seed)
        return True

    return holds


def runs(item: pytest.Item) -> Callable[[], bool]:
    """The test as pytest runs it, with its fixtures."""
    return lambda: all(report.outcome != "failed" for report in runtestprotocol(item, log=False))


class Hunt:
    """The pytest plugin that times every test once and then hunts mutants with them."""

    def __init__(self, half: Half, options: argparse.Namespace) -> None:
        self.half = half
        self.options = options

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = [item for item in session.items if not any(name in item.nodeid for name in LONG)]
        items = [item for item in items if SLOW_FIXTURE not in item.fixturenames]  # type: ignore[attr-defined]
        named = [(f"life {seed}", lives(seed)) for seed in range(LIVES)]
        checks = all_timed(self.half, named + [(item.nodeid, runs(item)) for item in items], self.options)
        print(f"\n# {len(checks)} checks of {sum(check.seconds for check in checks):.0f} s", flush=True)
        gc.freeze()
        total: Counter[str] = Counter()
        for name in self.options.modules:
            ends = self._hunt(name, checks)
            total += ends
            print(f"# {name}: {_summary(ends)}", flush=True)
        print(f"# together: {_summary(total)}", flush=True)
        return True

    def _hunt(self, name: str, checks: list[Check]) -> Counter[str]:
        """How the tried mutants of a module ended; those that nothing noticed are printed."""
        ends: Counter[str] = Counter()
        running: dict[int, str] = {}

        def wait() -> None:
            child, status = os.wait()
            what, end = running.pop(child), _end(os.waitstatus_to_exitcode(status))
            assert end != "broken", f"{name}.{what} could not be planted"
            ends[end] += 1
            if end == "survived":
                print(f"{name}.{what}", flush=True)

        for index, mutant in enumerate(self.half.mutants(name)):
            is_asked_for = any(text in mutant.what for text in self.options.only)
            if index % self.options.every != self.options.first or not is_asked_for:
                continue
            reaching = [check for check in checks if not mutant.lines.isdisjoint(check.lines[name])]
            running[hunted(mutant, reaching)] = mutant.what + ("" if reaching else "  (not reached)")
            if len(running) == self.options.jobs:
                wait()
        while running:
            wait()
        return ends


def _end(code: int) -> str:
    """How a mutant ended whose process ended with the code."""
    ends = {
        0: "survived",
        1: "failed",
        BROKEN: "broken",
        STILL: "never ended",
        -signal.SIGPROF: "never ended",
    }
    return ends.get(code, "crashed")


def _summary(ends: Counter[str]) -> str:
    killed = ends.total() - ends["survived"]
    other = ", ".join(f"{ends[end]} {end}" for end in ("crashed", "never ended") if ends[end])
    share = 100 * killed / max(ends.total(), 1)
    return f"{killed} of {ends.total()} killed ({share:.0f} %{other and '; ' + other})"


def hunted(mutant: Mutant, checks: list[Check]) -> int:
    """The process that tries a mutant: it exits with 0 where nothing notices."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    # One that never ends is noticed, too: by its CPU seconds, or because it waits.
    watch()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        mutant.plant()
    except BaseException:  # noqa: BLE001 - nothing may get back into pytest's loop
        os._exit(BROKEN)
    try:
        for check in checks:
            signal.setitimer(signal.ITIMER_PROF, SLACK_SECONDS + 5 * check.seconds)
            if not check.holds():
                os._exit(1)
    except BaseException:  # noqa: BLE001 - whatever it is, it was noticed
        os._exit(1)
    os._exit(0)


def watch() -> None:
    """End the process once it stands still; a busy machine alone does not end it."""
    used = time.process_time()

    def look(*_: object) -> None:
        nonlocal used
        if time.process_time() - used < STILL_CPU_SECONDS:
            os._exit(STILL)
        used = time.process_time()

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, STILL_SECONDS, STILL_SECONDS)


def parser_of(half: Half, description: str | None, tests: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--every", type=int, default=1, help="try only every n-th mutant")
    parser.add_argument("--first", type=int, default=0, help="begin with this one: another sample")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="try only mutants with one of these in what is told of them"
    )
    parser.add_argument("--jobs", type=int, default=2, help="so many mutants at once")
    parser.add_argument("--seconds", type=float, default=1.0, help="checks take no more of the CPU")
    parser.add_argument("--tests", default=",".join(tests), help="whose quick tests are asked beside lives")
    parser.add_argument("modules", nargs="*", default=half.modules)
    return parser


def hunt(half: Half, options: argparse.Namespace) -> int:
    """Hunt as the options say; the exit status."""
    tests = Path(__file__).parents[1]
    files = [str(file) for name in options.tests.split(",") for file in tests.rglob(f"test_{name}.py")]
    return pytest.main(
        ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-s", *files], plugins=[Hunt(half, options)]
    )


if __name__ == "__main__":
    python = PythonHalf()
    sys.exit(hunt(python, parser_of(python, __doc__, TESTS).parse_args()))
