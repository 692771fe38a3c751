"""Every import goes through a door between rooms, and no imports stand in a circle.

What is checked is read from the source: every import statement, those inside functions and those that only
type checkers follow included.  DOORS is the whole table: an arrow that it lacks is not allowed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"nudging": ROOT / "engine", "nudging.kernels": ROOT / "kernels"}

# Which rooms a room may import from, besides itself; "_C" is the module that C++ makes.
EVERYWHERE = {"errors", "checks"}
DOORS = {
    "__init__": {"api", "core", "executor", "policies"},
    "__main__": {"cli"},
    "cli": {"server", "api", "core", "policies", "models", "text", "pocket", "kernels", "_C"},
    "server": {"api", "core"},
    "api": {"executor", "core", "models", "policies", "text", "files", "kernels", "pocket", "_C"},
    "executor": {"core", "models", "kernels", "_C"},
    "core": {"policies", "text", "kernels", "_C"},
    "models": {"kernels", "files", "_C"},
    "policies": {"kernels"},
    "text": {"files"},
    "files": set(),
    "pocket": set(),
    "kernels": {"_C"},
    "checks": set(),
    "errors": set(),
    "_C": set(),
}
# Rooms of which importing any module loads no torch.
HOST_HALF = ("core", "policies", "text", "files", "checks", "errors")
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
    """The import statements below `body`; `at_import_time`: without those inside functions or for types."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif at_import_time and is_type_checking(node):
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


def room(module: str) -> str:
    """The first name below the package; the package itself is the room `__init__`."""
    return module.removeprefix("nudging").removeprefix(".").partition(".")[0] or "__init__"


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
    """Guards the guard: nested, aliased and type-only imports are seen."""
    assert "nudging.errors" in imports("nudging.models.registry")
    assert "nudging.api.llm" in imports("nudging.cli.options")
    assert "nudging.api.llm" not in imports("nudging.cli.options", at_import_time=True)
    assert "torch" in closure("nudging.api.llm")
    assert len(modules()) > 60


def test_the_table_names_every_room() -> None:
    assert {room(module) for module in modules()} | {"_C"} == set(DOORS)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_through_doors(module: str) -> None:
    allowed = DOORS[room(module)] | EVERYWHERE | {room(module)}
    for name in imports(module):
        if name.startswith("nudging."):
            assert room(name) in allowed, f"{module} imports {name}"


def circle_through(module: str) -> list[str]:
    """The modules of a circle of imports that `module` stands in, type-only imports counted; none: []."""
    came_from: dict[str, str] = {}
    todo = [module]
    while todo:
        current = todo.pop()
        for name in imports(current) & modules().keys() - {"nudging"}:
            if name == module:
                path = [current]
                while path[-1] != module:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if name not in came_from:
                came_from[name] = current
                todo.append(name)
    return []


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_import_stands_in_a_circle(module: str) -> None:
    assert circle_through(module) == []


def test_only_policies_and_doors_name_a_policy_class() -> None:
    """What is of a policy's writing, the other rooms read from its rule."""
    for module in modules():
        if room(module) in ("core", "executor", "models", "server", "text"):
            named = {name for name in imports(module) if name.startswith("nudging.policies")}
            assert named <= {"nudging.policies.protocol", "nudging.policies.rule"}, module


@pytest.mark.parametrize("module", sorted(m for m in modules() if room(m) in HOST_HALF))
def test_the_host_half_imports_no_torch(module: str) -> None:
    found = closure(module)
    assert "torch" not in found, f"{module} imports torch by way of {found.get('torch')}"


def test_the_host_half_loads_no_torch() -> None:
    """The same, by importing it."""
    names = ", ".join(m for m in modules() if room(m) in HOST_HALF)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["nudging", "nudging.kernels", "nudging.pocket", "nudging.cli.main"])
def test_what_is_imported_first_is_light(module: str) -> None:
    allowed = {"click"} if module == "nudging.cli.main" else set()
    assert not (closure(module).keys() & HEAVY) - allowed


def test_only_what_binds_sees_pybind11() -> None:
    sources = [file for pattern in ("*.cpp", "*.h", "*.cu") for file in (ROOT / "csrc").rglob(pattern)]
    binding = {file.name for file in sources if "pybind11" in file.read_text()}
    assert binding == {"bind.cpp", "bind_fast_path.cpp", "bind_fast_path.h"}


def test_include_knows_neither_torch_nor_python() -> None:
    for file in (ROOT / "csrc" / "include").rglob("*.h"):
        for word in ("torch/", "ATen/", "Python.h"):
            assert word not in file.read_text(), f"{file.name} includes {word}"
