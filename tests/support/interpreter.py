"""Triton's kernels without a GPU: its interpreter, made right where it is not.

`install` has to come before the first import of a module with kernels: @triton.jit reads the environment.  On
a machine with a GPU it does nothing, and the kernels' tests run there.

What it mends, in Triton 3.6 to 3.9: products and arithmetic of bf16 (the interpreter holds bf16 as integers
and multiplies those), rounding to bf16 (it truncates), comparisons of scalars (they keep the type of what is
compared), loops over run-time bounds with numpy >= 2.4 (in 3.6), inline assembly (it runs none; ptx.py runs
ours).
What it decides: the programs of a launch run in an order that none can count on, as on a GPU; and `tl.dot`
adds its products one by one in the order of k.  BLAS would choose an order by the tile's shape; so the bits
of a row depend on the kernel's own order alone, and tests can ask for them.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support import ptx

Floats = NDArray[np.float32]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def widen(bits: NDArray[np.uint16]) -> Floats:
    """The values of bf16 numbers that are given as their bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: Any) -> NDArray[np.uint16]:
    """The bits of the nearest bf16 numbers, ties to even."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def ordered_dot(a: Floats, b: Floats, total: Floats) -> Floats:
    """total + a @ b over the last two dimensions, one product after the other, each rounded to fp32."""
    for k in range(a.shape[-1]):
        total = total + a[..., :, k, None] * b[..., None, k, :]
    return total


class Result:
    """What the builder gives back where an operation may have several results."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, i: int) -> Any:
        return self.handle


def install() -> None:
    """Make this process interpret the kernels that it imports from now on, unless it has a GPU for them."""
    if DEVICE == "cuda":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def is_bf16(x: Any) -> bool:
        return bool(x.dtype.scalar == tl.bfloat16)

    def values(x: Any) -> Floats:
        return widen(x.data) if is_bf16(x) else x.data.astype(np.float32)

    def truth(x: Any) -> Any:
        return handle(x.data, tl.int1) if x.data.dtype == np.bool_ else x

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        return handle(ordered_dot(values(a), values(b), d.data), d.dtype.scalar)

    def mended(plain: Callable[..., Any]) -> Callable[..., Any]:
        """An operation of the builder that is right for bf16 operands too; its last argument is numpy's."""

        def operation(self: Any, *args: Any) -> Any:
            *operands, op = args
            if all(is_bf16(x) for x in operands):
                out = op(*(widen(x.data) for x in operands))
                return truth(handle(out if out.dtype == np.bool_ else narrow(out), tl.bfloat16))
            return truth(plain(self, *args))

        return operation

    convert = builder.cast_impl

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        if is_bf16(src) and to.scalar == tl.float32:
            return handle(widen(src.data), tl.float32)
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return handle(narrow(src.data), tl.bfloat16)
        return convert(self, src, to)

    def create_inline_asm(
        self: Any, asm: str, constraints: str, args: list[Any], types: list[Any], is_pure: bool, pack: int
    ) -> Any:
        """Of one tensor, packed into words, another of the same shape."""
        ((x,), (to,)) = args, types
        words = np.ascontiguousarray(x.data).reshape(-1, pack).view(np.uint32)
        made = ptx.run(asm, constraints.count("="), *words.T.copy())
        data = np.stack(made, axis=1).view(np.uint16).reshape(x.data.shape)
        to = to.scalar
        return Result(handle(data if to == tl.bfloat16 else data.view(np.float16), to))

    def set_grid_dim(self: Any, *dims: int) -> None:
        """At the begin of a launch: with the order in which its programs will run."""
        plain_dim(self, *dims)
        programs = list(itertools.product(*map(range, dims)))
        self.order = dict(zip(programs, dice.sample(programs, len(programs)), strict=True))

    def set_grid_idx(self: Any, *index: int) -> None:
        plain_idx(self, *self.order[index])

    dice = random.Random(0)
    plain_dim, plain_idx = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
    builder.cast_impl = cast_impl
    builder.binary_op = mended(builder.binary_op)
    builder.unary_op = mended(builder.unary_op)
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value])), tl.bfloat16)
    if triton.__version__.startswith("3.6."):
        mend_index(interpreter)


def mend_index(interpreter: Any) -> None:
    """Let scalar tensors be bounds of loops: numpy >= 2.4 converts no vector to an integer."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
