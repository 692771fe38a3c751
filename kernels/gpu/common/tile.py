"""The one order of additions of every product with a weight on a GPU, and the tiles that compute it.

A row's result does not depend on how many rows there are (I6).  The inputs are cut into partitions and a
partition into shares, which the shape of the weight alone decides; within a share an instruction of 16 inputs
(fp32: of one) adds onto the sum of those before.  Then neighbouring shares' sums are added, then those of the
pairs, and the partitions' sums in order.  How many rows, columns and inputs a program takes at a time and its
stages follow the number of rows, and none of that changes the order.

Each warp of a program computes one share.  So no two of them read the same weight or normalise the same
input, and the wait of an instruction for the one before it, some 30 cycles for 16 inputs, is that of a share
and not that of all inputs: for a weight of few columns it would be longer than the memory takes.

The instruction is mma.sync m16n8k16 for a few rows as for thousands, with columns of the weight as its 16 and
rows as its 8. Hopper and Blackwell have faster ones for large tiles, but nothing says that those round alike:
products of three dimensions never use them.

A product may normalise its input (squares.py): every element is rounded as `rms_norm` rounds it before it is
multiplied.  An int8 weight is exact in x's type, and its sums are multiplied by the scales; of 32 inputs an
instruction gets other 16 than with a weight of 16 bits, but the same ones in every tile.
"""

import triton
import triton.language as tl

from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.sums_of_squares import inverse_rms
from nudging.kernels.gpu.common.widen_int8 import widened

# Partitions begin at multiples of this.
UNIT = 256
# A partition of fewer inputs is not worth the launch that adds it.
MIN_PARTITION = 2048
# So many programs keep the memory of a GPU busy.
ENOUGH_PROGRAMS = 128
# Shares of a partition, and warps of a program.
SHARES = tl.constexpr(4)
# Shares begin at multiples of this, what two instructions take (of int8 weights they share it out otherwise).
STEP = tl.constexpr(32)
# Bytes of a line of the cache, and lines of each share's weights of a column that are fetched ahead.
LINE, LINES = tl.constexpr(128), tl.constexpr(2)


def partition(features: int, cols: int) -> int:
    """Inputs per partition for a weight [cols, features]: of its shape, and of nothing else, a function."""
    wanted = min(ENOUGH_PROGRAMS // -(-cols // 16), features // MIN_PARTITION)
    return -(-features // max(wanted, 1) // UNIT) * UNIT


@triton.jit
def share_of(start, end):
    """Inputs of a share of a partition: all begin at multiples of it."""
    return tl.cdiv(end - start, SHARES * STEP) * STEP


@triton.jit
def begin_product(weight_ptr, c, start, end, features, PDL: tl.constexpr, COLS: tl.constexpr):
    """`begin` of a product: while the kernel before it ends, the first weights of each share are fetched.

    Into the L2 cache and no register: nothing waits for them, and nobody writes weights.
    """
    if PDL:
        line: tl.constexpr = LINE // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        share = tl.arange(0, SHARES)[:, None, None] * share_of(start, end)
        k = tl.minimum(start + share + tl.arange(0, LINES)[None, None, :] * line, end - 1)
        at = weight_ptr + c[None, :, None].to(tl.int64) * features + k
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1)
    begin(PDL)


@triton.jit
def dot_tile(
    x_ptr, weight_ptr, norm_ptr, inverse, r, c, start, end, rows, features, x_stride,
    NORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[r] @ weight[c].T over inputs [start, end), in fp32: [ROWS, COLS].

    r: [ROWS], where those from `rows` on count as zero; c: [COLS], all of them rows of the weight; inverse:
    [ROWS], what the rows are multiplied by before the weights of the norm, if NORM.
    """
    share = share_of(start, end)
    first = start + tl.arange(0, SHARES)[:, None] * share
    last = tl.minimum(first + share, end)
    k = first + tl.arange(0, DEPTH)[None, :]
    x_at = r[None, None, :].to(tl.int64) * x_stride + k[:, :, None]
    weight_at = c[None, :, None].to(tl.int64) * features + k[:, None, :]
    own = (r < rows)[None, None, :]
    sums = tl.zeros([SHARES, COLS, ROWS], tl.float32)
    if NORM > 0:
        # Loaded a turn ahead: they are too small for the pipeline of the tiles.
        following = tl.load(norm_ptr + k, mask=k < last, other=0.0)
    for i in range(0, share, DEPTH):
        inside = k + i < last
        weight = tl.load(weight_ptr + weight_at + i, mask=inside[:, None, :], other=0)
        x = tl.load(x_ptr + x_at + i, mask=own & inside[:, :, None], other=0.0)
        if NORM > 0:
            scale = following.to(tl.float32)
            following = tl.load(norm_ptr + k + i + DEPTH, mask=k + i + DEPTH < last, other=0.0)
            if NORM == 2:
                scale = scale + 1.0
            x = (x.to(tl.float32) * inverse[None, None, :] * scale[:, :, None]).to(x.dtype)
        if weight.dtype == tl.int8:
            weight = widened(weight, x.dtype)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    # Sums of two have no order.
    pairs = tl.sum(tl.reshape(sums, [2, 2, COLS, ROWS]), 1)
    return tl.trans(tl.sum(pairs, 0))


@triton.jit
def all_partitions(
    x_ptr, weight_ptr, norm_ptr, squares_ptr, r, c, rows, features, x_stride, partition, eps,
    PARTITIONS: tl.constexpr, NORM: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[r] @ weight[c].T over all inputs, x normalised if NORM: see dot_tile."""
    inverse = 1.0
    if NORM > 0:
        inverse = inverse_rms(squares_ptr, r, rows, features, eps, LEVELS)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for p in range(PARTITIONS):
        end = tl.minimum((p + 1) * partition, features)
        sums += dot_tile(
            x_ptr, weight_ptr, norm_ptr, inverse, r, c, p * partition, end, rows, features, x_stride,
            NORM, ROWS, COLS, DEPTH,
        )  # fmt: skip
    return sums


@triton.jit
def finished(sums, scales_ptr, bias_ptr, c, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sums [ROWS, COLS], times the scales, plus the bias; c: [COLS], all of them columns."""
    if HAS_SCALES:
        sums *= tl.load(scales_ptr + c)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + c).to(tl.float32)[None, :]
    return sums


@triton.jit
def split_pairs(sums, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first and the second half of the columns of [ROWS, COLS]: two of [ROWS, COLS // 2]."""
    return tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, COLS // 2]), (0, 2, 1)))
