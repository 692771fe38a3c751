"""Does a test notice when the host half is changed?  `python -m tests.mutation` plants one change at a time
and counts those that the simulation and the scheduler's other quick tests notice.

A mutant is one changed node in a function's body, put in place of the function's code in a forked process.
"""

import argparse
import ast
import copy
import importlib
import os
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import (
    test_adaptive,
    test_blocks,
    test_cosched,
    test_faults,
    test_prefix_cache,
    test_scheduler,
    test_simulation,
)

MODULES = (
    "adaptive", "blocks", "cosched", "draft", "drafters", "engine", "prefix_cache", "request", "scheduler",
    "sequence", "view",
)  # fmt: skip
TESTS = (
    test_simulation, test_faults, test_scheduler, test_cosched, test_prefix_cache, test_blocks, test_adaptive,
)  # fmt: skip
CPU_SECONDS = 60

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
    elif isinstance(other, ast.Return) and other.value is not None:
        yield ast.Return(ast.Constant(None))


def is_skipped(node: ast.AST) -> bool:
    """Assertions, messages and the tracer decide nothing."""
    if isinstance(node, ast.Assert | ast.Raise | ast.JoinedStr):
        return True
    return "_tracer" in ast.dump(node) if isinstance(node, ast.Expr | ast.withitem) else False


def fields(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below: its parent, field and place there."""
    for name, value in ast.iter_fields(node):
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not is_skipped(child) and name not in ("annotation", "returns"):
                yield node, name, place, child
                yield from fields(child)


def mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Every mutant of a module: where and what, and the whole module with it."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for parent, name, place, child in fields(function):
            for other in mutated(child):
                ast.copy_location(other, child)
                _put(parent, name, place, other)
                what = (
                    f"{function.name}, line {getattr(child, 'lineno', 0)}: {_shown(child)} -> {_shown(other)}"
                )
                yield what, ast.fix_missing_locations(copy.deepcopy(tree))
                _put(parent, name, place, child)


def _put(parent: ast.AST, name: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[place] = node


def _shown(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:60]


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
        for a, b in ((have, value), (getattr(have, "fget", None), getattr(value, "fget", None))):
            if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
                a.__code__, a.__defaults__ = b.__code__, b.__defaults__
        if isinstance(have, type) and isinstance(value, type) and have.__module__ == value.__module__:
            _take_code(have, value)


def check() -> None:
    """What has to notice, the quickest first: lives, and the tests that take no arguments."""
    test_simulation.many_lives(0, 2_500)
    for module in TESTS:
        for name, test in vars(module).items():
            plain = callable(test) and name.startswith("test_") and not hasattr(test, "pytestmark")
            if plain and not test.__code__.co_argcount and name != "test_twenty_thousand_turns":
                test()


def survives(name: str, tree: ast.Module) -> bool:
    """Whether nothing notices a mutant, tried in a process of its own."""
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        # A mutant that never ends is noticed, too.
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        try:
            install(name, tree)
            check()
        except BaseException:  # noqa: BLE001 - whatever it is, it was noticed
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try only every n-th mutant")
    parser.add_argument("modules", nargs="*", default=MODULES)
    options = parser.parse_args()
    check()
    total = killed = 0
    for name in options.modules:
        path = Path(str(importlib.import_module(f"nudging.{name}").__file__))
        tried = noticed = 0
        for index, (what, tree) in enumerate(mutants(ast.parse(path.read_text()))):
            if index % options.every:
                continue
            tried += 1
            if survives(name, tree):
                print(f"{name}.{what}", flush=True)
            else:
                noticed += 1
        total, killed = total + tried, killed + noticed
        print(f"# {name}: {noticed} of {tried} killed", flush=True)
    print(f"# {killed} of {total} mutants killed ({100 * killed / total:.0f} %)")


if __name__ == "__main__":
    sys.exit(main())
