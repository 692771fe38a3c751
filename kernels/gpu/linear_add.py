"""A product into the residual stream on a GPU: a program per tile, or per tile and partition of the inputs.

With what it writes it leaves the sums of its squares, from which the product that reads it takes the scale of
the norm between them: sums of 16 columns are where rms_norm's own sum begins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require
from nudging.kernels.gpu.common.arrivals import arrives_last, check_arrivals
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.product_input import Source
from nudging.kernels.gpu.common.sums_of_squares import GROUP, groups_of, sums_of_squares
from nudging.kernels.gpu.common.tile import (
    SHARES,
    all_partitions,
    begin_product,
    dot_tile,
    finished,
    partition,
)
from nudging.kernels.linear_add import Stream
from nudging.kernels.weight import Weight


@triton.jit
def leave(
    y, residual_ptr, out_ptr, squares_ptr, r, c, rows, cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, HAS_SQUARES: tl.constexpr,
):  # fmt: skip
    """The residual stream plus y [ROWS, COLS], each rounded, and the sums of its squares."""
    at = r.to(tl.int64)[:, None] * cols + c[None, :]
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    dtype = out_ptr.dtype.element_ty
    total = y.to(dtype).to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = total.to(dtype)
    tl.store(out_ptr + at, total, mask=mask)
    if HAS_SQUARES:
        groups = tl.cdiv(cols, GROUP)
        g = tl.program_id(0) * (COLS // GROUP) + tl.arange(0, COLS // GROUP)
        squares = sums_of_squares(tl.where(mask, total.to(tl.float32), 0.0), ROWS, COLS)
        here = r.to(tl.int64)[:, None] * groups + g[None, :]
        tl.store(squares_ptr + here, squares, mask=(r < rows)[:, None] & (g < groups)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _linear_add(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, squares_ptr, parts_ptr, arrivals_ptr,
    rows, cols, features, x_stride, partition,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SQUARES: tl.constexpr, SPLIT: tl.constexpr,
    PARTITIONS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """SPLIT: a program computes one partition, into parts [partitions, tiles, ROWS, COLS]."""
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    known, p = tl.minimum(c, cols - 1), tl.program_id(2)
    end = tl.minimum((p + 1) * partition, features)
    begin_product(weight_ptr, known, p * partition, end, features, PDL, COLS)
    if SPLIT:
        tiles = tl.num_programs(0)
        part = dot_tile(
            x_ptr, weight_ptr, weight_ptr, 1.0, r, known, p * partition, end, rows, features, x_stride,
            0, ROWS, COLS, DEPTH,
        )  # fmt: skip
        i = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        parts_ptr += tl.program_id(0) * (ROWS * COLS) + i
        tl.store(parts_ptr + p * (tiles * ROWS * COLS), part)
        if arrives_last(arrivals_ptr + tl.program_id(0), PARTITIONS):
            sums = tl.zeros([ROWS, COLS], tl.float32)
            for q in range(PARTITIONS):
                sums += tl.load(parts_ptr + q * (tiles * ROWS * COLS), cache_modifier=".cg")
            y = finished(sums, scales_ptr, bias_ptr, known, HAS_SCALES, HAS_BIAS)
            leave(y, residual_ptr, out_ptr, squares_ptr, r, c, rows, cols, ROWS, COLS, HAS_SQUARES)
    else:
        sums = all_partitions(
            x_ptr, weight_ptr, weight_ptr, weight_ptr, r, known, rows, features, x_stride, partition, 0.0,
            PARTITIONS, 0, 0, ROWS, COLS, DEPTH,
        )  # fmt: skip
        y = finished(sums, scales_ptr, bias_ptr, known, HAS_SCALES, HAS_BIAS)
        leave(y, residual_ptr, out_ptr, squares_ptr, r, c, rows, cols, ROWS, COLS, HAS_SQUARES)


def linear_add(
    x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, arrivals: Tensor | None = None
) -> Stream:
    op = "linear_add"
    source = Source.of(op, x, weight, bias, None)
    x, values = source.x, source.weight
    (rows, features), cols = x.shape, values.shape[0]
    residual = require(op, "residual", residual, (rows, cols), x.dtype, x.device)
    out = torch.empty_like(residual)
    config, inputs = config_of(x.device), partition(features, cols)
    tile = config.tile(x.dtype, values.dtype, rows, cols)
    partitions = triton.cdiv(features, inputs) if inputs else 0
    grid = (triton.cdiv(cols, tile.cols), triton.cdiv(rows, tile.rows), 1)
    summed = config.leaves_squares(rows)
    squares = x.new_empty((rows, groups_of(cols)), dtype=torch.float32) if summed else None
    split = arrivals is not None and partitions > 1 and grid[1] == 1
    parts = out
    if arrivals is not None and split:
        arrivals = check_arrivals(op, arrivals, x)
        grid = (*grid[:2], partitions)
        parts = x.new_empty((partitions, grid[0], tile.rows * tile.cols), dtype=torch.float32)
    _linear_add[grid](
        *source[:4], residual, out, out if squares is None else squares,
        parts, out if arrivals is None else arrivals,
        rows, cols, features, x.stride(0), inputs,
        source.has_scales, source.has_bias, squares is not None, split, partitions,
        config.pdl, *tile[:3], **config.options(SHARES.value, tile.stages),
    )  # fmt: skip
    return Stream(out, squares)
