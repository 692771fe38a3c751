"""What a product's machine code asks of a multiprocessor while the memory brings its weights.

Of the innermost loop with matrix instructions: bytes that warps read from and write to shared memory, and
instructions that they issue, each in cycles, as parts of the cycles that the memory takes for the weights of
a turn.  More than 1 is a kernel that waits for something else than the memory, whatever else is done well;
less promises nothing, as what the warps wait for among themselves is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

# An H200: bytes that a device copy moves in a second, multiprocessors, cycles in a second under load.
BYTES_PER_CYCLE = 4.3e12 / 132 / 1.755e9
SHARED_BYTES_PER_CYCLE, SCHEDULERS, LANES = 128, 4, 32
WIDTHS = {".128": 16, ".64": 8}
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
BRANCH = re.compile(r"^BRA\b.*`\((\.L_x_\d+)\)")


class Demand(NamedTuple):
    """Cycles of shared memory and of the schedulers, as parts of those that the memory takes."""

    shared: float
    issue: float


def loops(code: str) -> Iterable[list[str]]:
    """The instructions between a label and a branch back to it, for each such branch of a disassembly."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        if found := INSTRUCTION.search(line):
            instructions.append(found.group(1))
            branch = BRANCH.match(found.group(1))
            if branch and branch.group(1) in labels:
                yield instructions[labels[branch.group(1)] :]


def shared_bytes(instruction: str) -> int:
    """That a warp moves to or from shared memory."""
    name = instruction.split()[0]
    if name.startswith("LDSM"):
        return 128 * int(name[-1])  # 8 by 8 elements of 16 bits for each matrix
    if name.startswith(("LDS", "STS", "LDGSTS")):
        return LANES * next((width for mark, width in WIDTHS.items() if mark in name), 4)
    return 0


def demand(code: str, warps: int, weight_bytes: int) -> Demand | None:
    """Of a disassembly; weight_bytes: those of a turn.  None where no loop has matrix instructions."""
    turns = [loop for loop in loops(code) if any(one.startswith("HMMA") for one in loop)]
    if not turns:
        return None
    turn = min(turns, key=len)
    memory = weight_bytes / BYTES_PER_CYCLE
    shared = warps * sum(map(shared_bytes, turn)) / SHARED_BYTES_PER_CYCLE
    issue = warps * len(turn) / SCHEDULERS
    return Demand(round(shared / memory, 2), round(issue / memory, 2))


def constants(kernel: Any) -> dict[str, Any]:
    """The values that a compiled kernel was made for, by name."""
    names = kernel.src.fn.arg_names
    return {names[key[0]]: value for key, value in kernel.src.constants.items()}
