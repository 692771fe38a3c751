"""Every Triton kernel compiles for real GPUs and spills nothing; needs none of them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = (80, 90, 100)
TABLE = ROOT / "benchmarks" / "results" / "triton-registers.json"
# How many kernels of each target are compiled again although neither source nor compiler has changed.
SAMPLE = 3
TOOLS = ("triton", "ptxas")


Found = dict[str, Any]


def made(out: Path, *options: str) -> Found:
    """The table as it is made now, by a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.aot", *options, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found: Found = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def table() -> Found:
    found: Found = json.loads(TABLE.read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Compiled are the kernels that the table lacks, by source and compiler, and a few that it has."""
    return made(tmp_path_factory.mktemp("aot") / "table.json", "--sample", str(SAMPLE))


@pytest.fixture(scope="module")
def compiled(found: Found) -> list[dict[str, Any]]:
    kernels: list[dict[str, Any]] = found["kernels"]
    return kernels


def kernels_of(file: Path) -> set[str]:
    """The functions of a file that are launched: those whose name begins with an underscore, by our habit."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in functions if any("jit" in ast.unparse(d) for d in node.decorator_list)]
    return {node.name for node in jitted if node.name.startswith("_")}


def test_every_kernel_is_compiled_for_every_target(compiled: list[dict[str, Any]]) -> None:
    every = set().union(*map(kernels_of, (ROOT / "kernels" / "gpu").rglob("*.py")))
    for sm in TARGETS:
        assert {one["kernel"] for one in compiled if one["sm"] == sm} == every


def test_kernels_that_start_while_the_one_before_ends_wait_for_it_first(found: Found) -> None:
    """Read from the machine code: a compiler may move loads, and one did (Triton's issue 11905)."""
    text = "".join(file.read_text() for file in (ROOT / "kernels" / "gpu").rglob("*.py"))
    waits = re.compile(r"^    begin(_product)?\(.*PDL", re.MULTILINE)
    functions = [part.split("(")[0] for part in text.split("\ndef ")[1:] if waits.search(part)]
    kernels = {name for name in functions if name.startswith("_")}
    for sm in (90, 100):
        assert {one["kernel"] for one in found["waiting"] if one["sm"] == sm} == kernels
    assert all(one["waits_first"] for one in found["waiting"])


def test_no_kernel_spills(compiled: list[dict[str, Any]]) -> None:
    assert not [one for one in compiled if one["stack"] or one["local"]]


def test_products_of_16_bit_types_have_one_instruction(compiled: list[dict[str, Any]]) -> None:
    """Tiles of any size have the same bits only if the instruction is the same, and so is its rounding."""
    products = [
        one
        for one in compiled
        if one["kernel"].startswith(("_linear", "_gated_linear", "_attend", "_lm_head"))
    ]
    used = {(one["call"].split()[-1], *one["matrix_instructions"]) for one in products}
    instruction = "mma.sync.m16n8k16"
    assert used == {("fp32",), ("bf16", instruction), ("fp16", instruction)}


def test_products_give_the_same_inputs_to_an_instruction(compiled: list[dict[str, Any]]) -> None:
    """Whatever the tile, the norm and the GPU, by the types of the operands alone."""
    products = [one for one in compiled if one["kernel"].startswith(("_linear", "_gated", "_lm_head"))]
    used = {("int8" in one["call"], *one["input_widths"]) for one in products if one["matrix_instructions"]}
    assert used == {(False, 2), (True, 4)}


def test_products_of_few_rows_wait_for_nothing_but_the_memory(compiled: list[dict[str, Any]]) -> None:
    """As far as bytes of shared memory and instructions tell: a warp that does another's work again shows."""
    few = [one for one in compiled if one["sm"] == 90 and re.search(r"-(8|16) (bf|fp)16", one["call"])]
    products = [one for one in few if one["issue_demand"] is not None]
    assert len(products) >= 20
    assert max(one["shared_demand"] for one in products) <= 0.8
    assert max(one["issue_demand"] for one in products if "int8" not in one["call"]) <= 0.6
    assert max(one["issue_demand"] for one in products) <= 0.85


def test_no_kernel_asks_for_more_shared_memory_than_any_gpu_has(compiled: list[dict[str, Any]]) -> None:
    assert max(one["shared"] for one in compiled) <= 99 << 10


def assert_is_the_table(found: Found, table: Found) -> None:
    """Figures are compared where the compiler is the table's."""
    remedy = "`python -m tests.support.aot` brings benchmarks/results/triton-registers.json up to date"
    if any(found[tool] != table[tool] for tool in TOOLS):
        names = [f"{tool} {version[tool]}" for version in (table, found) for tool in TOOLS]
        warnings.warn(f"the table is of {names[:2]}, not of {names[2:]}: {remedy}", stacklevel=1)
    else:
        for name in ("kernels", "waiting"):
            assert found[name] == table[name], remedy


def test_the_table_is_what_the_compiler_makes(found: Found, table: Found) -> None:
    """Of the kernels that were compiled now, the figures; of the others, the source that they are of."""
    assert len(found["compiled"]) >= SAMPLE * len(TARGETS)
    assert_is_the_table(found, table)


def test_what_the_table_lacks_or_has_of_another_source_is_compiled(table: Found, tmp_path: Path) -> None:
    lacking, other = table["kernels"][5], table["waiting"][3]
    changed = {
        "kernels": [one for one in table["kernels"] if one != lacking],
        "waiting": [one if one != other else {**one, "key": "another"} for one in table["waiting"]],
    }
    known = tmp_path / "known.json"
    known.write_text(json.dumps({**table, **changed}))
    remade = made(tmp_path / "table.json", "--known", str(known))
    if {tool: remade[tool] for tool in TOOLS} == {tool: table[tool] for tool in TOOLS}:
        assert sorted(remade["compiled"]) == sorted([lacking["key"], other["key"]])
    assert_is_the_table(remade, table)


@pytest.mark.slow
def test_the_whole_table_is_what_the_compiler_makes(table: Found, tmp_path: Path) -> None:
    whole = made(tmp_path / "table.json", "--whole")
    assert len(whole["compiled"]) == len(whole["kernels"]) + len(whole["waiting"])
    assert_is_the_table(whole, table)
