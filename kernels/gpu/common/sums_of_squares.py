"""The norm between two products, without a launch of its own.

The product that writes the residual stream leaves the sums of the squares of every GROUP columns.  rms_norm
adds neighbours, then neighbouring sums: those are the lower levels of its tree, so the product that reads the
stream adds up the rest and has rms_norm's bits.
"""

import triton
import triton.language as tl

from nudging.kernels.gpu.common.stats import tree_sum

GROUP, GROUP_LEVELS = tl.constexpr(16), tl.constexpr(4)


def groups_of(cols: int) -> int:
    """How many sums of squares a row of so many columns has."""
    return -(-cols // int(GROUP.value))


@triton.jit
def inverse_rms(squares_ptr, r, rows, features, eps, LEVELS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of rows r, with the bits of rms_norm: its sum begins with these."""
    groups, g = tl.cdiv(features, GROUP), tl.arange(0, 1 << LEVELS)
    at = r.to(tl.int64)[:, None] * groups + g[None, :]
    squares = tl.load(squares_ptr + at, mask=(r < rows)[:, None] & (g < groups)[None, :], other=0.0)
    return tl.rsqrt(tree_sum(squares, LEVELS) / features + eps)


@triton.jit
def sums_of_squares(y, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sums of the squares of y [ROWS, COLS], fp32, by GROUP columns: [ROWS, COLS // GROUP]."""
    COUNT: tl.constexpr = COLS // GROUP
    sums = tree_sum(tl.reshape(y * y, [ROWS * COUNT, GROUP]), GROUP_LEVELS)
    return tl.reshape(sums, [ROWS, COUNT])
