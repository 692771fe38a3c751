"""No test passes or fails by what a clock reads: speed is measured in benchmarks/, waiting.py waits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Who may: each reads a clock or sleeps for something that no test passes by.
MAY = {
    "waiting.py": "asks again until what must come has come",
    "simulation.py": "prints turns per second where it is run by hand",
    "cycle_schedules.py": "prints seconds where it is run by hand",
    "mutation.py": "notices a mutant that hangs; not a test",
}
# Seconds to wait from which on a test that is not hung has never failed, and below which it must end at once.
LONG, SHORT = 60.0, 0.02
WAITS = {"result", "join", "wait", "poll", "communicate", "drain", "run"}


def clocks(code: str) -> Iterator[str]:
    """The reads of a real clock, the sleeps, and the waits that a busy machine may outlast."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import) and any(one.name == "time" for one in node.names):
            yield f"line {node.lineno}: import time"
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield f"line {node.lineno}: from time"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            limits = [one.value for one in node.keywords if one.arg == "timeout"]
            limits += node.args[:1] if node.func.attr in ("wait", "join", "poll") else []
            seconds = [one.value for one in limits if isinstance(one, ast.Constant)]
            numbers = [one for one in seconds if isinstance(one, int | float) and not isinstance(one, bool)]
            if node.func.attr in WAITS and any(SHORT < one < LONG for one in numbers):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: file.name)
def test_no_test_reads_a_clock(file: Path) -> None:
    if file.name not in MAY:
        assert not list(clocks(file.read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "from time import perf_counter",
        "handle.result(timeout=5)",
        "thread.join(10)",
        "child.wait(timeout=0.5)",
    ],
)
def test_a_clock_is_found(code: str) -> None:
    assert list(clocks(code))


@pytest.mark.parametrize(
    "code", ["import timeit", "a.result(timeout=0.0)", "a.wait(PATIENCE)", "','.join(x)"]
)
def test_what_is_none_is_not_found(code: str) -> None:
    assert not list(clocks(code))
