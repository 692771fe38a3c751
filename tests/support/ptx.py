"""The few PTX instructions of our inline assembly, on numpy's words: what the interpreter runs instead.

From the PTX manual; an instruction that is not here is refused by name, and so is a constant that it would
read otherwise than as bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Each nibble of the selector picks one of the eight bytes of b:a; its highest bit is not used."""
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        which = selector >> np.uint32(4 * i) & np.uint32(0xF)
        assert (which < 8).all()
        byte = (pair >> (which * 8).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        out |= byte << np.uint32(8 * i)
    return out


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit by bit, the entry of the table that the three bits name."""
    out = np.zeros_like(a)
    for i in range(32):
        bit = np.uint32(i)
        entry = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        out |= (table >> entry & 1) << bit
    return out


def halves(words: Words) -> NDArray[np.uint16]:
    return words.reshape(-1, 1).view(np.uint16)


def fma_bf16x2(a: Words, b: Words, c: Words) -> Words:
    """In fp64, which holds products of two bf16 numbers; rounded to nearest, ties to even."""
    x, y, z = ((halves(w).astype(np.uint32) << 16).view(np.float32).astype(np.float64) for w in (a, b, c))
    bits = (x * y + z).astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint32).reshape(a.shape)


def sub_f16x2(a: Words, b: Words) -> Words:
    difference = halves(a).view(np.float16) - halves(b).view(np.float16)
    return difference.view(np.uint32).reshape(a.shape)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma_bf16x2,
    "sub.rn.f16x2": sub_f16x2,
}
TAKE_NO_CONSTANTS = ("fma.rn.bf16x2", "sub.rn.f16x2")


def run(asm: str, outputs: int, *inputs: Words) -> list[Words]:
    """The output registers $0, $1, ... of a block of instructions, given the input registers behind them."""
    registers = {f"${outputs + i}": words for i, words in enumerate(inputs)}

    def value(name: str, instruction: str) -> Words:
        if name[0].isdigit():
            assert instruction not in TAKE_NO_CONSTANTS, f"{instruction} takes no constant"
            return np.full_like(inputs[0], int(name, 0))
        return registers[name]

    for statement in re.sub(r"[{}]", "", asm).split(";"):
        if not statement.strip() or statement.split()[0] == ".reg":
            continue
        instruction, operands = statement.split(maxsplit=1)
        to, *names = (name.strip() for name in operands.split(","))
        registers[to] = INSTRUCTIONS[instruction](*(value(name, instruction) for name in names))
    return [registers[f"${i}"] for i in range(outputs)]
