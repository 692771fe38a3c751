"""Compile Triton kernels for GPUs that are not there, as the JIT would.

`python -m tests.support.aot [--whole]` brings the table of figures up to date.

The wrappers of the kernels run on tensors without data, in a process that does not interpret, under a driver
that names the target and launches nothing: what is compiled is what is shipped, specialised as at a launch.
Writes benchmarks/results/triton-registers.json, the figures of all kernels that the shipped calls launch, and
whether those that are launched while the one before ends wait for it.

A figure has a key: the source of its kernel and of all that this calls, what it is specialised for, and the
code that reads the figure.  Where key and compiler are those of the table, the figure is taken from it and
nothing is compiled; with --whole, everything is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import pkgutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITCallable, JITFunction

from nudging.kernels import gpu
from nudging.kernels.gpu.common import configs
from tests.support import demand, machine_code
from tests.support.shipped import SHIPPED

TARGETS = (80, 90, 100)
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "triton-registers.json"
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

Entry = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """A kernel that a call launches on a GPU; `waits`: while the one before it ends."""

    call: str
    kernel: str
    sm: int
    waits: bool
    key: str


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


@contextmanager
def on(sm: int, waits: bool) -> Iterator[None]:
    """Inside, what is launched is compiled for this GPU, by its table."""
    triton.runtime.driver.set_active(Nowhere(sm))
    table = {divmod(sm, 10): replace(configs.DEFAULT, pdl=True)} if waits else {}
    with (
        mock.patch.object(configs, "capability", return_value=divmod(sm, 10)),
        mock.patch.dict(configs.TABLE, table),
    ):
        yield


def forget_lines() -> None:
    """Let Triton's hash of a kernel's source not depend on the line that the source begins at."""
    for module in pkgutil.walk_packages(gpu.__path__, f"{gpu.__name__}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, JITCallable):
                value.starting_line_number = 0


READ_BY = hashlib.sha256(b"".join(Path(one.__file__).read_bytes() for one in (demand, machine_code)))


def key_of(kernel: JITFunction[Any], specialised: str, sm: int) -> str:
    """specialised: types, alignments, constants and options, as Triton names them among its own keys."""
    parts = READ_BY.hexdigest(), kernel.cache_key, specialised, str(sm)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def launched(launch: Callable[[str, str], bool], call: str, sm: int, waits: bool) -> list[Any]:
    """The kernels of a call of which `launch`, asked by name and key, says that they be compiled.

    It is asked of no kernel that this process has compiled before, and those are left out.
    """
    found, asked = [], False
    plain = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        nonlocal asked
        asked = False
        kernel = plain(self, *args, grid=grid, warmup=True, **kwargs)
        if asked and kernel is not None:
            found.append(kernel)

    def is_left_out(key: str, fn: Any, **kwargs: Any) -> bool:
        nonlocal asked
        asked = True
        return not launch(fn.jit_function.__name__, key_of(fn.jit_function, key, sm))

    with (
        on(sm, waits),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(knobs.runtime, "jit_cache_hook", is_left_out),
        torch.device("meta"),
    ):
        SHIPPED[call]()
    return found


def planned() -> list[Launch]:
    """What all calls launch on all targets, each kernel once for each of them; compiles nothing."""
    made: dict[str, Launch] = {}
    calls = [(call, sm, False) for sm in TARGETS for call in SHIPPED]
    calls += [(call, sm, True) for sm in TARGETS if sm >= 90 for call in WAITING]
    for call, sm, waits in calls:

        def note(kernel: str, key: str, call: str = call, sm: int = sm, waits: bool = waits) -> bool:
            made.setdefault(key, Launch(call, kernel, sm, waits, key))
            return False

        launched(note, call, sm, waits)
    return list(made.values())


def compiled(launch: Launch) -> Entry:
    """The entry of this kernel, from its machine code."""
    (kernel,) = launched(lambda _, key: key == launch.key, launch.call, launch.sm, launch.waits)
    if launch.waits:
        found: Entry = {"waits_first": machine_code.waits_first(kernel)}
    else:
        found = machine_code.figures(launch.call, kernel)
    return {"call": launch.call, "kernel": launch.kernel, "sm": launch.sm, **found, "key": launch.key}


def compiler() -> dict[str, str]:
    return {"triton": triton.__version__, "ptxas": machine_code.assembler()}


def sample_of(plan: list[Launch], size: int) -> set[str]:
    """The keys of so many launches for each target.  Keys are hashes: another source draws other ones."""
    of_targets = (sorted(one.key for one in plan if one.sm == sm) for sm in TARGETS)
    return {key for keys in of_targets for key in keys[:size]}


def table(known: Entry, sample: int = 0, whole: bool = False) -> Entry:
    """The table of now, given the one of before; "compiled" are the keys that were not taken from it."""
    plan, tools = planned(), compiler()
    same = tools == {name: known.get(name) for name in tools}
    old = {one["key"]: one for name in ("kernels", "waiting") for one in known[name]} if same else {}
    again = sample_of(plan, sample)
    todo = [one for one in plan if whole or one.key in again or one.key not in old]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(todo)) or 1, context, forget_lines) as pool:
        fresh = {one["key"]: one for one in pool.map(compiled, todo)}
    # A call may have another name now: names are the plan's.
    entries = {one.key: {**old.get(one.key, {}), **vars_of(one), **fresh.get(one.key, {})} for one in plan}
    kernels = [entries[one.key] for one in plan if not one.waits]
    waiting = [entries[one.key] for one in plan if one.waits]
    return {**tools, "kernels": kernels, "waiting": waiting, "compiled": list(fresh)}


def vars_of(launch: Launch) -> Entry:
    return {"call": launch.call, "kernel": launch.kernel, "sm": launch.sm}


def listed(entries: Iterable[Entry]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring the table of compiled kernels up to date.")
    parser.add_argument("--whole", action="store_true", help="compile all, also what the table has")
    parser.add_argument("--sample", type=int, default=0, help="of what the table has, compile so many again")
    parser.add_argument("--known", type=Path, default=TABLE, help="the table to take figures from")
    parser.add_argument("--out", type=Path, default=TABLE)
    chosen = parser.parse_args()
    forget_lines()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        made = table(json.loads(chosen.known.read_text()), chosen.sample, chosen.whole)
    keys = made.pop("compiled")
    parts = [f'"{name}": {json.dumps(made[name])}' for name in ("triton", "ptxas")]
    parts += [f'"{name}": {listed(made[name])}' for name in ("kernels", "waiting")]
    if chosen.out != TABLE:
        parts.append(f'"compiled": {json.dumps(keys)}')
    chosen.out.write_text("{" + ", ".join(parts) + "}\n")
    print(f"{len(keys)} of {len(made['kernels']) + len(made['waiting'])} compiled")


if __name__ == "__main__":
    main()
