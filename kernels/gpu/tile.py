"""The one order of additions of every product with a weight on a GPU, and the tiles that compute it.

A row's result does not depend on how many rows there are (I6).  The inputs are cut into partitions, which the
shape of the weight alone decides; within one, an instruction of 16 inputs (fp32: of one) adds onto the sum of
those before; the partitions' sums are added in order.  How many rows, columns and inputs a program takes at a
time, its warps and its stages follow the number of rows, and none of that changes the order.

The instruction is mma.sync m16n8k16 for a few rows as for thousands. Hopper and Blackwell have faster ones
for large tiles, but nothing says that those round alike: products of three dimensions never use them.

A product may normalise its input (squares.py): every element is rounded as `rms_norm` rounds it before it is
multiplied.  An int8 weight is exact in x's type, and its sums are multiplied by the scales; of 32 inputs an
instruction gets other 16 than with a weight of 16 bits, but the same ones in every tile.
"""

import triton
import triton.language as tl

from .squares import inverse_rms

# Partitions begin at multiples of this; the depth of every tile divides it.
UNIT = 256
# A partition of fewer inputs is not worth the launch that adds it.
MIN_PARTITION = 2048
# So many programs keep the memory of a GPU busy.
ENOUGH_PROGRAMS = 128


def partition(features: int, cols: int) -> int:
    """Inputs per partition for a weight [cols, features]: of its shape, and of nothing else, a function."""
    wanted = min(ENOUGH_PROGRAMS // -(-cols // 16), features // MIN_PARTITION)
    return -(-features // max(wanted, 1) // UNIT) * UNIT


@triton.jit
def widened(weight, dtype: tl.constexpr):
    """int8 as that type, exactly; the conversion of the hardware has an eighth of the rate of additions."""
    near = (weight.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True)
    return (near - 12582912.0).to(dtype)


@triton.jit
def dot_tile(
    x_ptr, weight_ptr, norm_ptr, inverse, r, c, begin, end, rows, features, x_stride,
    NORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[r] @ weight[c].T over inputs [begin, end), in fp32: [1, ROWS, COLS].

    r: [ROWS], where those from `rows` on count as zero; c: [COLS], all of them rows of the weight; inverse:
    [ROWS], what the rows are multiplied by before the weights of the norm, if NORM.
    """
    k = tl.arange(0, DEPTH)
    x_at = r[None, :, None].to(tl.int64) * x_stride + k[None, None, :]
    weight_at = c[None, None, :].to(tl.int64) * features + k[None, :, None]
    sums = tl.zeros([1, ROWS, COLS], tl.float32)
    if NORM > 0:
        # Loaded a turn ahead: they are too small for the pipeline of the tiles.
        following = tl.load(norm_ptr + begin + k, mask=begin + k < end, other=0.0)
    for i in range(begin, end, DEPTH):
        inside = i + k < end
        x = tl.load(x_ptr + x_at + i, mask=(r < rows)[None, :, None] & inside[None, None, :], other=0.0)
        weight = tl.load(weight_ptr + weight_at + i, mask=inside[None, :, None], other=0)
        if NORM > 0:
            scale = following.to(tl.float32)
            following = tl.load(norm_ptr + i + DEPTH + k, mask=i + DEPTH + k < end, other=0.0)
            if NORM == 2:
                scale = scale + 1.0
            x = (x.to(tl.float32) * inverse[None, :, None] * scale[None, None, :]).to(x.dtype)
        if weight.dtype == tl.int8:
            weight = widened(weight, x.dtype)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    return sums


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
    sums = tl.zeros([1, ROWS, COLS], tl.float32)
    for p in range(PARTITIONS):
        end = tl.minimum((p + 1) * partition, features)
        sums += dot_tile(
            x_ptr, weight_ptr, norm_ptr, inverse, r, c, p * partition, end, rows, features, x_stride,
            NORM, ROWS, COLS, DEPTH,
        )  # fmt: skip
    return sums


@triton.jit
def finished(sums, scales_ptr, bias_ptr, c, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sums [1, ROWS, COLS], times the scales, plus the bias; c: [COLS], all of them columns."""
    if HAS_SCALES:
        sums *= tl.load(scales_ptr + c)[None, None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + c).to(tl.float32)[None, None, :]
    return sums


@triton.jit
def split_pairs(sums, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first and the second half of the columns of [1, ROWS, COLS]: two of [ROWS, COLS // 2]."""
    return tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, COLS // 2]), (0, 2, 1)))
