"""Matrix product with a weight on a GPU: a program per tile of the output; see tile.py for the order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.product_input import Source
from nudging.kernels.gpu.common.sums_of_squares import inverse_rms
from nudging.kernels.gpu.common.tile import (
    SHARES,
    all_partitions,
    begin_product,
    dot_tile,
    finished,
    partition,
)
from nudging.kernels.rms_norm import Norm
from nudging.kernels.weight import Weight

BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, norm_ptr, squares_ptr, eps, out_ptr,
    rows, cols, features, x_stride, partition,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, LEVELS: tl.constexpr,
    PARTITIONS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = tl.minimum(c, cols - 1)
    begin_product(weight_ptr, known, 0, tl.minimum(partition, features), features, PDL, COLS)
    sums = all_partitions(
        x_ptr, weight_ptr, norm_ptr, squares_ptr, r, known, rows, features, x_stride, partition, eps,
        PARTITIONS, NORM, LEVELS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    y = finished(sums, scales_ptr, bias_ptr, known, HAS_SCALES, HAS_BIAS)
    r, c = r[:, None], c[None, :]
    at = r.to(tl.int64) * cols + c
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(r < rows) & (c < cols))


@triton.jit(do_not_specialize=["rows"])
def _linear_partition(
    x_ptr, weight_ptr, norm_ptr, squares_ptr, eps, sums_ptr, rows, cols, features, x_stride, partition,
    NORM: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One partition's sums, into sums [partitions, rows, cols]."""
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    p = tl.program_id(2)
    end = tl.minimum((p + 1) * partition, features)
    inverse = 1.0
    if NORM > 0:
        inverse = inverse_rms(squares_ptr, r, rows, features, eps, LEVELS)
    sums = dot_tile(
        x_ptr, weight_ptr, norm_ptr, inverse, r, tl.minimum(c, cols - 1), p * partition, end,
        rows, features, x_stride, NORM, ROWS, COLS, DEPTH,
    )  # fmt: skip
    r, c = r[:, None], c[None, :]
    at = (p * rows + r).to(tl.int64) * cols + c
    tl.store(sums_ptr + at, sums, mask=(r < rows) & (c < cols))


@triton.jit(do_not_specialize=["rows"])
def _add_partitions(
    sums_ptr, scales_ptr, bias_ptr, out_ptr, rows, cols, PARTITIONS: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(PARTITIONS):
        total += tl.load(sums_ptr + (p * rows + row) * cols + c, mask=c < cols, other=0.0)
    if HAS_SCALES:
        total *= tl.load(scales_ptr + c, mask=c < cols, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + c, mask=c < cols, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * cols + c, total.to(out_ptr.dtype.element_ty), mask=c < cols)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    norm: Norm | None = None,
) -> Tensor:
    source = Source.of("linear", x, weight, bias, norm)
    x, values, scales, bias_or_any, norm_weight, squares, eps, has_scales, has_bias, *how = source
    dtype = out_dtype or x.dtype
    if dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"linear: out_dtype is {out_dtype}; only x's {x.dtype} and torch.float32 can be asked for"
        )
    (rows, features), cols = x.shape, values.shape[0]
    out = x.new_empty((rows, cols), dtype=dtype)
    config = config_of(x.device)
    tile = config.tile(x.dtype, values.dtype, rows, cols)
    inputs = partition(features, cols)
    partitions = triton.cdiv(features, inputs) if inputs else 0
    grid = (triton.cdiv(cols, tile.cols), triton.cdiv(rows, tile.rows))
    shape = (rows, cols, features, x.stride(0), inputs)
    if partitions <= 1 or grid[1] > 1:
        _linear[grid](
            *source[:7], out, *shape, *source[7:], partitions, config.pdl, *tile[:3],
            **config.options(SHARES.value, tile.stages),
        )  # fmt: skip
        return out
    sums = x.new_empty((partitions, rows, cols), dtype=torch.float32)
    _linear_partition[(*grid, partitions)](
        x, values, norm_weight, squares, eps, sums, *shape, *how, *tile[:3],
        num_warps=SHARES.value, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    _add_partitions[(rows, triton.cdiv(cols, BLOCK))](
        sums, scales, bias_or_any, out, rows, cols, partitions, has_scales, has_bias, BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
