"""A file is one idea of at most 400 lines; a function fits on a screen, at most 60 lines."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 60

PYTHON = sorted(file for folder in ("engine", "kernels") for file in (ROOT / folder).rglob("*.py"))
CPP = sorted(file for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for file in (ROOT / "csrc").rglob(pattern))

NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
# What stands before the brace of a block that is not a function's, or not the whole of one.
NO_FUNCTION = re.compile(r"^\s*(?:namespace|class|struct|enum|union|extern)\b|=\s*$")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def python_functions(source: str) -> Iterator[tuple[str, int]]:
    """Each function's name and its number of lines, decorators not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def cpp_functions(source: str) -> Iterator[tuple[str, int]]:
    """Each function's head and its number of lines; a function is an outermost block after parameters."""
    code = NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    blocks: list[tuple[str, int, bool]] = []
    head_start = 0
    for match in re.finditer(r"[{};]|^#[^\n]*(?:\\\n[^\n]*)*", code, re.MULTILINE):
        if match[0] == "{":
            head = code[head_start : match.start()]
            inside = any(is_function for _, _, is_function in blocks)
            blocks.append((head, head_start, not inside and ")" in head and not NO_FUNCTION.search(head)))
        elif match[0] == "}" and blocks:
            head, start, is_function = blocks.pop()
            if is_function:
                yield " ".join(head.split()), code[start : match.end()].strip().count("\n") + 1
        head_start = match.end()


@pytest.mark.parametrize("file", PYTHON + CPP, ids=name_of)
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= FILE_LINES


@pytest.mark.parametrize("file", PYTHON + CPP, ids=name_of)
def test_no_function_is_long(file: Path) -> None:
    functions = python_functions if file.suffix == ".py" else cpp_functions
    long = {name: lines for name, lines in functions(file.read_text()) if lines > FUNCTION_LINES}
    # The module of bindings is one call per op.
    long = {name: lines for name, lines in long.items() if not name.startswith("PYBIND11_MODULE")}
    assert not long


def test_the_package_itself_only_names() -> None:
    assert len((ROOT / "engine" / "__init__.py").read_text().splitlines()) < 40


def test_functions_are_measured_as_they_stand() -> None:
    """Guards the guard, on both languages."""
    python = "class A:\n    def f(self):\n        def g():\n            pass\n        return g\n"
    assert dict(python_functions(python)) == {"f": 4, "g": 2}
    cpp = """
namespace a {
// void no() {
struct S {
  int f(int x) const {
    if (x) {
      return '}';
    }
    return 0;
  }
  int y = 0;
};
template <class T>
void g(T t) {
  h([&] {
    t();
  });
}
}
"""
    assert [lines for _, lines in cpp_functions(cpp)] == [6, 6]
