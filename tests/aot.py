"""Compile every Triton kernel for GPUs that are not there, as the JIT would: `python -m tests.aot [SM ...]`.

The wrappers of the kernels run on tensors without data, in a process that does not interpret, under a driver
that names the target and launches nothing: what is compiled is what is shipped, specialised as at a launch.
Prints JSON: the version of Triton, a list of `Compiled`, and for GPUs that can launch a kernel while the one
before it ends a list of `Waits`.  Of all calls this is benchmarks/results/triton-registers.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nudging.kernels.gpu import configs
from nudging.kernels.gpu.tile import SHARES
from tests.demand import Demand, constants, demand
from tests.shipped import SHIPPED

TARGETS = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.]*?\.(m\d+n\d+k\d+)")


# What waits for the kernel before (griddepcontrol.wait), and what touches memory that kernels share.
WAIT, TOUCH = "ACQBULK", r"LDG|STG|LDGSTS|ATOMG|RED|LD|ST|ATOM|UBLKCP"
# A call of every kernel that waits.
WAITING = (
    "rms_norm llama-8b bf16",
    "add_rms_norm llama-8b bf16",
    "layer_norm olmo-7b bf16",
    "embed gemma-27b bf16",
    "rope_append qwen3-8b bf16",
    "linear qwen3-8b-qkv bf16",
    "linear_rope_append llama-8b-16 bf16",
    "linear_rope_append qwen3-8b bf16",
    "gated_linear llama-8b-16 bf16",
    "linear_add llama-1b-down-16 bf16",
    "linear_add qwen-0.5b-down-16 bf16",
    "paged_attention llama-8b decode bf16",
    "paged_attention llama-8b prefill bf16",
    "lm_head llama-8b-8 bf16",
)


@dataclass(frozen=True)
class Waits:
    """A kernel that is launched while the one before it ends: whether it waits before it touches memory."""

    call: str
    kernel: str
    sm: int
    waits_first: bool


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call for one target; bytes of stack and of local memory are what it spills.

    input_widths: how many inputs in a row a thread holds for an instruction, so which inputs those are;
    shared_demand, issue_demand: of products with a weight, see demand.py.
    """

    call: str
    kernel: str
    sm: int
    warps: int
    registers: int
    shared: int
    stack: int
    local: int
    matrix_instructions: list[str]
    input_widths: list[int]
    shared_demand: float | None
    issue_demand: float | None


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


def tool(name: str, option: str, cubin: bytes) -> str:
    """What one of Triton's tools says of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


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


def record(call: str, sm: int, kernel: Any) -> Compiled:
    used = usage(kernel.asm["cubin"])
    found = sorted({".".join(match) for match in MATRIX_INSTRUCTION.findall(kernel.asm["ptx"])})
    dots = "".join(re.findall(r"tt\.dot .*", kernel.asm["ttgir"]))
    widths = sorted({int(width) for width in re.findall(r"kWidth = (\d+)", dots)})
    size = (used["reg"], kernel.metadata.shared, used["stack"], used["local"])
    asks = weight_demand(call, kernel) or (None, None)
    return Compiled(call, kernel.name, sm, kernel.metadata.num_warps, *size, found, widths, *asks)


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


@contextmanager
def on(sm: int) -> Iterator[None]:
    """Inside, what is launched is compiled for this GPU, by its table."""
    triton.runtime.driver.set_active(Nowhere(sm))
    with mock.patch.object(configs, "capability", return_value=divmod(sm, 10)):
        yield


def compile_all(targets: list[int]) -> list[Compiled]:
    """What all shipped calls launch, each kernel once for each of these targets."""
    made: dict[Any, Compiled] = {}
    for sm in targets:
        with on(sm):
            for call, thunk in SHIPPED.items():
                for kernel in launched(thunk):
                    if kernel.hash not in made:
                        made[kernel.hash] = record(call, sm, kernel)
    return list(made.values())


def waits_first(cubin: bytes) -> bool:
    """Whether the machine code waits before its first instruction that touches memory of the device."""
    found = re.findall(rf"\b({WAIT}|{TOUCH})\b", tool("nvdisasm", "-c", cubin))
    return len(found) > 1 and found[0] == WAIT


def compile_waiting(targets: list[int]) -> list[Waits]:
    """The kernels of a layer, launched while the one before ends, where that can be done."""
    made = []
    for sm in (sm for sm in targets if sm >= 90):
        table = {divmod(sm, 10): replace(configs.DEFAULT, pdl=True)}
        with on(sm), mock.patch.dict(configs.TABLE, table):
            for call in WAITING:
                for kernel in launched(SHIPPED[call]):
                    assert kernel.metadata.launch_pdl
                    made.append(Waits(call, kernel.name, sm, waits_first(kernel.asm["cubin"])))
    return made


def listed(made: Iterable[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(asdict(one)) for one in made) + "\n]"


if __name__ == "__main__":
    targets = [int(sm) for sm in sys.argv[1:]] or list(TARGETS)
    kernels, waiting = listed(compile_all(targets)), listed(compile_waiting(targets))
    print(f'{{"triton": "{triton.__version__}", "kernels": {kernels}, "waiting": {waiting}}}')
