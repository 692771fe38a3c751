"""What is read from a compiled kernel: its registers, its instructions, and what it does first."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from nudging.kernels.gpu.common.tile import SHARES
from tests.support.demand import Demand, constants, demand

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.]*?\.(m\d+n\d+k\d+)")
# What waits for the kernel before (griddepcontrol.wait), and what touches memory that kernels share.
WAIT, TOUCH = "ACQBULK", r"LDG|STG|LDGSTS|ATOMG|RED|LD|ST|ATOM|UBLKCP"


def tool(name: str, option: str, cubin: bytes) -> str:
    """What one of Triton's tools says of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def assembler() -> str:
    """The version of the assembler that Triton runs."""
    said = subprocess.run([TOOLS / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d[\d.]*)", said)[0]


def usage(cubin: bytes) -> dict[str, int]:
    said = tool("cuobjdump", "-res-usage", cubin)
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def weight_demand(call: str, kernel: Any) -> Demand | None:
    """What a product with a weight asks for beside the memory; of others nothing is known."""
    made_for = constants(kernel)
    if "DEPTH" not in made_for:
        return None
    warps, element = kernel.metadata.num_warps, 1 if "int8" in call else 2
    cols = made_for["COLS"] if "COLS" in made_for else 1 << made_for["LEVELS"]
    code = tool("nvdisasm", "-c", kernel.asm["cubin"])
    return demand(code, warps, SHARES.value * cols * made_for["DEPTH"] * element)


def figures(call: str, kernel: Any) -> dict[str, Any]:
    """Of a kernel that this call launches; bytes of stack and of local memory are what it spills.

    input_widths: how many inputs in a row a thread holds for an instruction, so which inputs those are;
    shared_demand, issue_demand: of products with a weight, see demand.py.
    """
    used = usage(kernel.asm["cubin"])
    dots = "".join(re.findall(r"tt\.dot .*", kernel.asm["ttgir"]))
    shared, issue = weight_demand(call, kernel) or (None, None)
    return {
        "warps": kernel.metadata.num_warps,
        "registers": used["reg"],
        "shared": kernel.metadata.shared,
        "stack": used["stack"],
        "local": used["local"],
        "matrix_instructions": sorted({".".join(m) for m in MATRIX_INSTRUCTION.findall(kernel.asm["ptx"])}),
        "input_widths": sorted({int(width) for width in re.findall(r"kWidth = (\d+)", dots)}),
        "shared_demand": shared,
        "issue_demand": issue,
    }


def waits_first(kernel: Any) -> bool:
    """Whether the machine code waits before its first instruction that touches memory of the device."""
    assert kernel.metadata.launch_pdl
    found = re.findall(rf"\b({WAIT}|{TOUCH})\b", tool("nvdisasm", "-c", kernel.asm["cubin"]))
    return len(found) > 1 and found[0] == WAIT
