"""Gate, up and activation on a GPU: a program computes the same columns of both halves."""

import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import activate
from nudging.kernels.gpu.common.product_input import Source
from nudging.kernels.gpu.common.tile import (
    SHARES,
    all_partitions,
    begin_product,
    finished,
    partition,
    split_pairs,
)
from nudging.kernels.gpu.gated_act import check_activation, gated_act
from nudging.kernels.gpu.linear import linear
from nudging.kernels.rms_norm import Norm
from nudging.kernels.weight import Weight


@triton.jit(do_not_specialize=["rows"])
def _gated_linear(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, norm_ptr, squares_ptr, eps, out_ptr,
    rows, dim, features, x_stride, partition,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, LEVELS: tl.constexpr,
    ACTIVATION: tl.constexpr, PARTITIONS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLS // 2
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    first = tl.program_id(0) * HALF
    c = c // HALF * dim + tl.minimum(first + c % HALF, dim - 1)
    begin_product(weight_ptr, c, 0, tl.minimum(partition, features), features, PDL, COLS)
    sums = all_partitions(
        x_ptr, weight_ptr, norm_ptr, squares_ptr, r, c, rows, features, x_stride, partition, eps,
        PARTITIONS, NORM, LEVELS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    y = finished(sums, scales_ptr, bias_ptr, c, HAS_SCALES, HAS_BIAS)
    # Rounded as between two ops.
    gate, up = split_pairs(y.to(x_ptr.dtype.element_ty).to(tl.float32), ROWS, COLS)
    y = activate(gate, ACTIVATION) * up
    r, c = r[:, None], (first + tl.arange(0, HALF))[None, :]
    at = r.to(tl.int64) * dim + c
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(r < rows) & (c < dim))


def gated_linear(
    x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    op = "gated_linear"
    check_activation(op, activation)
    source = Source.of(op, x, weight, bias, norm)
    (rows, features), both = x.shape, source.weight.shape[0]
    if both % 2 != 0:
        raise ValueError(f"{op}: {both} columns do not halve into gate and up")
    config, inputs, dim = config_of(x.device), partition(features, both), both // 2
    tile = config.tile(x.dtype, source.weight.dtype, rows, both)
    if features > inputs and rows <= tile.rows:
        return gated_act(linear(source.x, weight, bias, norm=norm if source.kind else None), activation)
    out = x.new_empty(rows, dim)
    _gated_linear[(triton.cdiv(dim, tile.cols // 2), triton.cdiv(rows, tile.rows))](
        *source[:7], out, rows, dim, features, source.x.stride(0), inputs, *source[7:],
        activation, triton.cdiv(features, inputs) if inputs else 0,
        config.pdl, *tile[:3], **config.options(SHARES.value, tile.stages),
    )  # fmt: skip
    return out
