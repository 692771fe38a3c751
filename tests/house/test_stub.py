"""`_C.pyi` says what the module in C++ has: every name, and how many arguments each function takes."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from nudging import _C

STUB = ast.parse((Path(__file__).parents[2] / "engine" / "_C.pyi").read_text(encoding="utf-8"))


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or a class of the stub declares, by name; names of types for the stub alone left out."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def there(owner: Any) -> set[str]:
    """The public names of the module or of one of its classes."""
    return {name for name in vars(owner) if not name.startswith("_")}


CLASSES = {name: value for name, value in vars(_C).items() if inspect.isclass(value)}


def test_the_stub_has_the_modules_names() -> None:
    # Assigned are the names of types, which are the stub's alone.
    said = {name for name, node in declared(STUB.body).items() if not isinstance(node, ast.Assign)}
    assert said == there(_C)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_stub_has_a_classes_names(name: str) -> None:
    node = declared(STUB.body)[name]
    assert isinstance(node, ast.ClassDef)
    said = {one for one in declared(node.body) if not one.startswith("_")}
    assert said == there(CLASSES[name]) - {"name", "value"} | (said & {"name", "value"})


def functions() -> list[tuple[str, Any, ast.FunctionDef]]:
    """The functions and methods that stand on both sides, each by its name."""
    found = []
    owners: list[tuple[Any, str, Any]] = [(_C, "", STUB)]
    owners += [(value, name, declared(STUB.body)[name]) for name, value in CLASSES.items()]
    for owner, name, place in owners:
        for one, node in declared(place.body).items():
            value = inspect.getattr_static(owner, one, None)
            if isinstance(node, ast.FunctionDef) and value is not None and getattr(value, "__doc__", None):
                found.append((f"{name}.{one}", value, node))
    return found


@pytest.mark.parametrize(("name", "value", "node"), [pytest.param(*one, id=one[0]) for one in functions()])
def test_a_function_takes_as_many_arguments_as_the_stub_says(
    name: str, value: Any, node: ast.FunctionDef
) -> None:
    signature = re.match(r"\w+\((.*)\) -> ", value.__doc__)
    if signature is None:
        pytest.skip("it has several signatures, or is a property")
    counted = len(re.findall(r"(?:^|, )\w+: ", signature[1]))
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    assert len(arguments) == counted
