"""Does a test notice when the host half in C++ is changed?

`python -m tests.support.mutation_cpp` does to csrc/host and its headers what `mutation` does to Python.

All mutants are compiled once, into a copy: `a < b` becomes `(mutant(17) ? (a <= b) : (a < b))`.  A forked
process sets the number that is asked for, and the numbers that a check asks for are the mutants it reaches.
"""

import ctypes
import importlib.util
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tree_sitter_cpp
from tree_sitter import Language, Node, Parser

from tests.support.mutation import Mutant, hunt, parser_of

ROOT = Path(__file__).parents[2]
FILES = (
    "host/sequence.cpp", "host/policy_step.cpp", "host/fast_path.cpp", "host/batch.cpp", "host/ledger.cpp",
    "include/nudging/fast_path.h", "include/nudging/ledger.h",
)  # fmt: skip
TESTS = (
    "simulation",
    "fast_path_core",
    "fast_path",
    "scheduler",
    "cosched",
    "faults",
    "prefix_cache",
    "adaptive",
)
# Of memory, more than without a mutant: one that never ends may eat before its time is over.
SLACK_BYTES = 4 << 30

SWAPPED = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&",
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "+=": "-=", "-=": "+=", "++": "--", "--": "++",
    "true": "false", "false": "true", "std::min": "std::max", "std::max": "std::min",
}  # fmt: skip
OPERATIONS = ("binary_expression", "assignment_expression", "update_expression")
# Names, sizes and messages decide nothing.
SKIPPED = ("template_argument_list", "array_declarator", "throw_statement", "preproc_include")
# What has no other sign: of strings, and of two pointers.
NOT_COMPILED = ("seen += ", "differs.first - ")
DECLARED = """#pragma once
#include <cstdint>
#define TOLD __attribute__((visibility("default")))
extern "C" TOLD std::int32_t nudging_mutant;
extern "C" TOLD std::uint8_t nudging_reached[{count}];
inline bool mutant(int number) {{
  nudging_reached[number] = 1;
  return number == nudging_mutant;
}}
"""
DEFINED = "std::int32_t nudging_mutant = -1;\nstd::uint8_t nudging_reached[{count}];\n"


class Change(NamedTuple):
    """A mutant by its number."""

    number: int
    line: int
    before: str
    after: str


class Rewriter:
    """One file with all its mutants in it."""

    def __init__(self, source: str, first: int) -> None:
        """`first`: the number of its first mutant."""
        self.changes: list[Change] = []
        self._first = first
        tree = Parser(Language(tree_sitter_cpp.language())).parse(source.encode())
        assert not tree.root_node.has_error
        self.text = self._rewritten(tree.root_node)

    def _number(self, node: Node, before: str, after: str) -> int:
        number = self._first + len(self.changes)
        short = (" ".join(part.split())[:60] for part in (before, after))
        self.changes.append(Change(number, node.start_point[0] + 1, *short))
        return number

    def _rewritten(self, node: Node) -> str:
        text = _text(node)
        if node.type in SKIPPED:
            return text
        if node.type == "declaration" and text.startswith("constexpr"):
            return text + self._as_macros(node)
        new, at = "", node.start_byte
        for child in node.children:
            new += _between(node, at, child.start_byte) + self._rewritten(child)
            at = child.end_byte
        new += _between(node, at, node.end_byte)
        for other in expressions(node):
            new = f"(mutant({self._number(node, text, other)}) ? ({other}) : ({new}))"
        for other in conditions(node):
            if other == "true":
                new = f"mutant({self._number(node, text, other)}) || ({new})"
            else:
                new = f"!mutant({self._number(node, text, other)}) && ({new})"
        for other in statements(node):
            number = self._number(node, text, other)
            new = f"{{ if (mutant({number})) {{ {other} }} else {{ {new} }} }}"
        return new

    def _as_macros(self, declaration: Node) -> str:
        """Constants, asked for wherever they are used."""
        kind = declaration.child_by_field_name("type")
        assert kind is not None
        macros = ""
        for one in declaration.children_by_field_name("declarator"):
            name, value = one.child_by_field_name("declarator"), one.child_by_field_name("value")
            assert name is not None
            assert value is not None
            macros += f"\n#define {_text(name)} static_cast<{_text(kind)}>({self._rewritten(value)})"
        return macros + "\n"


def _text(node: Node) -> str:
    assert node.text is not None
    return node.text.decode()


def _between(node: Node, first: int, last: int) -> str:
    assert node.text is not None
    return node.text[first - node.start_byte : last - node.start_byte].decode()


def expressions(node: Node) -> Iterator[str]:
    """What may stand in an expression's place."""
    text = _text(node)
    if node.type in OPERATIONS and not text.startswith(NOT_COMPILED):
        operator = node.child_by_field_name("operator")
        if operator is not None and _text(operator) in SWAPPED:
            yield _with(node, operator)
    elif node.type == "call_expression":
        function = node.child_by_field_name("function")
        assert function is not None
        head = _text(function).partition("<")[0]
        if head in SWAPPED:
            yield SWAPPED[head] + text[len(head) :]
    elif node.type == "unary_expression" and text.startswith("!"):
        yield text[1:]
    elif node.type == "number_literal":
        yield f"{text} + 1"
    elif node.type in ("true", "false"):
        yield SWAPPED[text]


def _with(node: Node, operator: Node) -> str:
    """The operation with the operator that its own is swapped for."""
    before = _between(node, node.start_byte, operator.start_byte)
    return before + SWAPPED[_text(operator)] + _between(node, operator.end_byte, node.end_byte)


def conditions(node: Node) -> Iterator[str]:
    """What may stand in a condition's place: what never holds, or always."""
    parent = node.parent
    if parent is None or not node.is_named or "declaration" in node.type:
        return
    kind = parent.type
    if kind == "condition_clause" and parent.child_by_field_name("value") == node:
        assert parent.parent is not None
        kind = parent.parent.type
    elif kind != "conditional_expression" or parent.child_by_field_name("condition") != node:
        return
    yield "false"
    if kind != "while_statement":
        yield "true"


def statements(node: Node) -> Iterator[str]:
    """What may be done instead of a statement."""
    if node.type == "expression_statement":
        yield ""
    elif node.type in ("continue_statement", "break_statement"):
        yield "break;" if node.type == "continue_statement" else "continue;"
    elif node.type == "return_statement" and node.named_child_count:
        value = node.named_child(0)
        assert value is not None
        is_plain = value.type in ("number_literal", "true", "false", "null", "unary_expression")
        if not is_plain and _may_return_nothing(node):
            yield "return {};"


def _may_return_nothing(node: Node) -> bool:
    """Neither a reference nor what a lambda's type is found from."""
    around = node.parent
    while around is not None and around.type not in ("lambda_expression", "function_definition"):
        around = around.parent
    assert around is not None
    declarator = around.child_by_field_name("declarator")
    return (
        around.type == "function_definition" and declarator is not None and "reference" not in declarator.type
    )


class CppHalf:
    """csrc/host, built with all its mutants."""

    modules = FILES

    def __init__(self) -> None:
        self.changes: dict[str, list[Change]] = {}
        self._library: ctypes.CDLL | None = None

    def write(self, copy: Path) -> None:
        """Put the mutants into a copy of csrc."""
        texts, count = {}, 0
        for name in FILES:
            file = Rewriter((ROOT / "csrc" / name).read_text(), count)
            texts[name], self.changes[name] = file.text, file.changes
            count += len(file.changes)
        for name, text in texts.items():
            end = DEFINED.format(count=count) if name == FILES[0] else ""
            (copy / name).write_text(f'#include "nudging/mutant.h"\n{text}{end}')
        (copy / "include/nudging/mutant.h").write_text(DECLARED.format(count=count))

    def load(self, extension: Path) -> None:
        """Use the extension as `nudging._C` from now on."""
        assert "nudging" not in sys.modules
        spec = importlib.util.spec_from_file_location("nudging._C", extension)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["nudging._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._library = ctypes.CDLL(str(extension))

    @property
    def _reached(self) -> ctypes.Array[ctypes.c_uint8]:
        count = sum(map(len, self.changes.values()))
        return (ctypes.c_uint8 * count).in_dll(self._library, "nudging_reached")

    def mutants(self, name: str) -> Iterator[Mutant]:
        for number, line, before, after in self.changes[name]:
            what = f"line {line}: {before} -> {after}"
            yield Mutant(what, partial(self._plant, number), frozenset([number]))

    def _plant(self, number: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + SLACK_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        ctypes.c_int32.in_dll(self._library, "nudging_mutant").value = number

    def record(self) -> Callable[[], dict[str, list[int]]]:
        reached = self._reached
        ctypes.memset(reached, 0, len(reached))
        return lambda: {
            name: [change.number for change in changes if reached[change.number]]
            for name, changes in self.changes.items()
        }


def build(half: CppHalf, folder: Path) -> Path:
    """The extension with all mutants, built from a copy in the folder."""
    for name in ("setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    half.write(folder / "csrc")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "lib", "--build-temp", "objects"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (extension,) = (folder / "lib").glob("nudging/_C*")
    return extension


def main() -> int:
    half = CppHalf()
    parser = parser_of(half, __doc__, TESTS)
    parser.add_argument("--folder", type=Path, help="where to build; it is kept, and the next build is quick")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        half.load(build(half, folder))
        return hunt(half, options)


if __name__ == "__main__":
    sys.exit(main())
