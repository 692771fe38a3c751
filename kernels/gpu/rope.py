"""Rotary position embedding on a GPU: a program per row and head.

A position outside the tables gives NaN: to refuse it would take waiting for the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes


@triton.jit
def channels(from_ptr, norm_ptr, inverse, at, mask, NORM: tl.constexpr):
    """Channels of a head; if NORM, times `inverse` and their weights (2: with a unit offset), rounded."""
    x = tl.load(from_ptr + at, mask=mask, other=0.0)
    if NORM > 0:
        scale = tl.load(norm_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if NORM == 2:
            scale = scale + 1.0
        x = (x.to(tl.float32) * inverse * scale).to(x.dtype)
    return x


@triton.jit
def copy_rest(from_ptr, to_ptr, norm_ptr, inverse, begin, end, write, NORM: tl.constexpr, REST: tl.constexpr):
    """Channels [begin, end), which are not turned; REST: as many or more, a power of two."""
    at = begin + tl.arange(0, REST)
    x = channels(from_ptr, norm_ptr, inverse, at, at < end, NORM)
    tl.store(to_ptr + at, x, mask=(at < end) & write)


@triton.jit
def rotated(a, b, c, s):
    """The pairs (a, b), fp32, turned by the angle of cosine `c` and sine `s`."""
    return a * c - b * s, b * c + a * s


@triton.jit
def rotate_head(
    from_ptr, to_ptr, norm_ptr, inverse, position, cos_ptr, sin_ptr, max_position, head_dim, half, write,
    NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One head, turned by its position's angles, if `write`.  HALF, REST: see Parts; NORM: see channels."""
    at = tl.arange(0, HALF)
    inside = at < half
    known = inside & (position >= 0) & (position < max_position)
    c = tl.load(cos_ptr + position * half + at, mask=known, other=float("nan"))
    s = tl.load(sin_ptr + position * half + at, mask=known, other=float("nan"))
    a = channels(from_ptr, norm_ptr, inverse, at, inside, NORM).to(tl.float32)
    b = channels(from_ptr, norm_ptr, inverse, half + at, half + at < 2 * half, NORM).to(tl.float32)
    a, b = rotated(a, b, c, s)
    tl.store(to_ptr + at, a.to(to_ptr.dtype.element_ty), mask=inside & write)
    tl.store(to_ptr + half + at, b.to(to_ptr.dtype.element_ty), mask=inside & write)
    if REST > 0:
        copy_rest(from_ptr, to_ptr, norm_ptr, inverse, 2 * half, head_dim, write, NORM, REST)


@triton.jit
def _rope(
    x_ptr, position_ptr, cos_ptr, sin_ptr, out_ptr, row_stride, head_stride, max_position, head_dim, half,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    out_ptr += (row * tl.num_programs(1) + head) * head_dim
    rotate_head(
        x_ptr + row * row_stride + head * head_stride, out_ptr, x_ptr, 1.0, tl.load(position_ptr + row),
        cos_ptr, sin_ptr, max_position, head_dim, half, row >= 0, 0, HALF, REST,
    )  # fmt: skip


class Parts(NamedTuple):
    """Powers of two that hold half the turned channels of a head and those that are not turned, or 0."""

    half: int
    rest: int

    @classmethod
    def of(cls, op: str, head_dim: int, half: int) -> "Parts":
        rest = head_dim - 2 * half
        if half < 1 or rest < 0:
            raise ValueError(f"{op}: the tables turn {2 * half} channels, heads have {head_dim}")
        return cls(triton.next_power_of_2(half), triton.next_power_of_2(rest) if rest else 0)


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    op = "rope"
    rows, heads, head_dim = sizes(op, "x", x, 3)
    max_position, half = sizes(op, "cos", cos, 2)
    if x.stride(2) != 1:
        x = x.contiguous()
    positions = require(op, "positions", positions, (rows,), torch.int64, x.device)
    cos = require(op, "cos", cos, (max_position, half), torch.float32, x.device)
    sin = require(op, "sin", sin, (max_position, half), torch.float32, x.device)
    parts = Parts.of(op, head_dim, half)
    out = x.new_empty(rows, heads, head_dim)
    _rope[(rows, heads)](
        x, positions, cos, sin, out, x.stride(0), x.stride(1), max_position, head_dim, half,
        parts.half, parts.rest, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out
