"""Imports point one way: the command line -> the API -> the engine -> its parts -> the kernels -> C++.

What is checked is read from the source: every import statement, those inside functions included, but not
those that only type checkers follow.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"nudging": ROOT / "engine", "nudging.kernels": ROOT / "kernels"}

# Who may import whom: a module imports from its own layer and from those after it.
LAYERS = (
    ("cli", "cli_*", "demo", "terminal", "__main__"),
    ("aio", "metrics"),
    ("api",),
    ("watched",),
    ("aio_generation", "aio_handle", "jobs", "scores"),
    ("generation",),
    ("engine_thread", "handle"),
    ("engine",),
    ("*",),
    ("kernels", "kernels.*"),
    ("_C",),
)
# The half that runs without torch: importing any of these loads none of it.
HOST_HALF = (
    "blocks", "chat", "chat_content", "chat_messages", "chat_sandbox", "detokenize", "errors",
    "lfs", "options", "params", "policies", "prompts", "request", "request_options", "roles",
    "scheduler", "sequence", "tokenizer", "tokenizer_files", "tokenizer_json", "tokenizer_sp", "totals",
    "trace",
)  # fmt: skip
POLICIES_MAY_IMPORT = ("policies", "kernels", "errors", "options")
HEAVY = {"torch", "numpy", "triton", "safetensors", "tokenizers", "sentencepiece", "jinja2", "rich", "click"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = file
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(body: list[ast.stmt], at_import_time: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below `body`; `at_import_time` leaves out those inside functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_type_checking(node):
            yield from statements(node.orelse, at_import_time)  # type: ignore[attr-defined]
        elif not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from statements(list(ast.iter_child_nodes(node)), at_import_time)  # type: ignore[arg-type]


@cache
def imports(module: str, at_import_time: bool = False) -> frozenset[str]:
    """The dotted names that a module imports: modules of the package as such, others by their first name."""
    file = modules()[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(file.read_text()).body, at_import_time):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        start = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
        origin = (start + (node.module or "")).rstrip(".")
        for alias in node.names:
            inner = f"{origin}.{alias.name}"
            found.add(inner if inner in modules() or inner == "nudging._C" else origin)
    return frozenset(name if name.startswith("nudging") else name.partition(".")[0] for name in found)


def own(module: str) -> str:
    """A module's name within the package; the package itself has none."""
    return module.removeprefix("nudging").removeprefix(".")


def layer(module: str) -> int:
    """The number of the first layer that names the module, or with a star what it begins with."""
    name = own(module)
    special = [i for i, names in enumerate(LAYERS) for pattern in names if matches(name, pattern)]
    return special[0] if special else LAYERS.index(("*",))


def matches(name: str, pattern: str) -> bool:
    if pattern.endswith("*"):
        return len(pattern) > 1 and name.startswith(pattern[:-1])
    return name == pattern


def closure(module: str) -> dict[str, str]:
    """Everything that importing a module imports, each with the module that asks for it."""
    asked_by: dict[str, str] = {}
    todo = [module]
    while todo:
        current = todo.pop()
        for name in imports(current, at_import_time=True):
            if name not in asked_by:
                asked_by[name] = current
                if name in modules():
                    todo.append(name)
    return asked_by


def test_the_reader_of_imports_reads_them_all() -> None:
    """Guards the guard: relative, nested and aliased imports are seen, type-only ones are not."""
    assert "nudging.errors" in imports("nudging.models.registry")
    assert "nudging.api.llm" in imports("nudging.cli.options")
    assert "nudging.api.llm" not in imports("nudging.cli.options", at_import_time=True)
    assert "nudging.core.engine_thread" not in imports("nudging.api.handle")
    assert "torch" in closure("nudging.api.llm")
    assert len(modules()) > 60


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_one_way(module: str) -> None:
    if module == "nudging":
        return
    for name in imports(module):
        if name in modules() and name != "nudging":
            assert layer(name) >= layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if own(m).startswith("kernels")))
def test_kernels_import_nothing_of_the_engine(module: str) -> None:
    for name in imports(module):
        if name.startswith("nudging"):
            assert name.startswith(("nudging.kernels", "nudging._C")), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if own(m).startswith("policies")))
def test_policies_import_kernels_errors_and_options_only(module: str) -> None:
    for name in imports(module):
        if name.startswith("nudging"):
            assert own(name).partition(".")[0] in POLICIES_MAY_IMPORT, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if own(m).partition(".")[0] in HOST_HALF))
def test_the_host_half_imports_no_torch(module: str) -> None:
    found = closure(module)
    assert "torch" not in found, f"{module} imports torch by way of {found.get('torch')}"


def test_the_host_half_loads_no_torch() -> None:
    """The same, by importing it."""
    names = ", ".join(m for m in modules() if own(m).partition(".")[0] in HOST_HALF)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["nudging", "nudging.kernels", "nudging.pocket", "nudging.cli.main"])
def test_what_is_imported_first_is_light(module: str) -> None:
    allowed = {"click"} if module == "nudging.cli.main" else set()
    assert not (closure(module).keys() & HEAVY) - allowed


def test_only_what_binds_sees_pybind11() -> None:
    sources = [file for pattern in ("*.cpp", "*.h", "*.cu") for file in (ROOT / "csrc").rglob(pattern)]
    binding = {file.name for file in sources if "pybind11" in file.read_text()}
    assert binding == {"bind.cpp", "bind_lanes.cpp", "bind_lanes.h"}


def test_include_knows_neither_torch_nor_python() -> None:
    for file in (ROOT / "csrc" / "include").rglob("*.h"):
        for word in ("torch/", "ATen/", "Python.h"):
            assert word not in file.read_text(), f"{file.name} includes {word}"
