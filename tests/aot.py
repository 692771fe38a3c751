"""Compile every Triton kernel for GPUs that are not there, as the JIT would: `python -m tests.aot [SM ...]`.

The wrappers of the kernels run on tensors without data, in a process that does not interpret, under a driver
that names the target and launches nothing: what is compiled is what is shipped, specialised as at a launch.
Prints JSON: the version of Triton, and a list of `Compiled`.  Of all calls this is
benchmarks/results/triton-registers.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.shipped import SHIPPED

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX_INSTRUCTION = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.]*?\.(m\d+n\d+k\d+)")


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call for one target; bytes of stack and of local memory are what it spills."""

    call: str
    kernel: str
    sm: int
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    matrix_instructions: list[str]


class Nowhere:
    """What the JIT asks a driver, when all it does is compile."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_device(self) -> int:
        return self.sm  # the JIT keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


def usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}


def record(call: str, sm: int, kernel: Any) -> Compiled:
    used = usage(kernel.asm["cubin"])
    found = sorted({".".join(match) for match in MATRIX_INSTRUCTION.findall(kernel.asm["ptx"])})
    meta = kernel.metadata
    return Compiled(
        call, kernel.name, sm, meta.num_warps, used["reg"], meta.shared, used["stack"], used["local"], found
    )


def launched(thunk: Callable[[], Any]) -> list[Any]:
    """The kernels that a call would launch, compiled for the active driver's target."""
    found = []
    plain = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found.append(plain(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = run
    try:
        with torch.device("meta"):
            thunk()
    finally:
        JITFunction.run = plain
    return found


def compile_all(targets: list[int]) -> list[Compiled]:
    """What all shipped calls launch, each kernel once for each of these targets."""
    made: dict[Any, Compiled] = {}
    for sm in targets:
        triton.runtime.driver.set_active(Nowhere(sm))
        for call, thunk in SHIPPED.items():
            for kernel in launched(thunk):
                if kernel.hash not in made:
                    made[kernel.hash] = record(call, sm, kernel)
    return list(made.values())


if __name__ == "__main__":
    made = compile_all([int(sm) for sm in sys.argv[1:]] or list(TARGETS))
    lines = ",\n".join(json.dumps(asdict(one)) for one in made)
    print(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}')
