"""Gate, up and activation on a GPU: a program computes the same columns of both halves."""

import triton
import triton.language as tl
from torch import Tensor

from .gated_act import check_activation, gated_act
from .linear import check_linear, linear
from .math import activate
from .tile import all_partitions, partition, split_pairs, tile_for


@triton.jit(do_not_specialize=["rows"])
def _gated_linear(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, dim, features, x_stride, partition,
    ACTIVATION: tl.constexpr, PARTITIONS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLS // 2
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    first = tl.program_id(0) * HALF
    c = c // HALF * dim + tl.minimum(first + c % HALF, dim - 1)
    sums = all_partitions(
        x_ptr, weight_ptr, r, c, rows, features, x_stride, partition, PARTITIONS, ROWS, COLS, DEPTH
    )
    if HAS_BIAS:
        sums += tl.load(bias_ptr + c).to(tl.float32)[None, None, :]
    # Rounded as between two ops.
    gate, up = split_pairs(sums.to(x_ptr.dtype.element_ty).to(tl.float32), ROWS, COLS)
    y = activate(gate, ACTIVATION) * up
    r, c = r[:, None], (first + tl.arange(0, HALF))[None, :]
    at = r.to(tl.int64) * dim + c
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(r < rows) & (c < dim))


def gated_linear(x: Tensor, weight: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    op = "gated_linear"
    x, weight, bias_or_any = check_linear(op, x, weight, bias)
    (rows, features), both = x.shape, weight.shape[0]
    if both % 2 != 0:
        raise ValueError(f"{op}: {both} columns do not halve into gate and up")
    check_activation(op, activation)
    inputs, tile, dim = partition(features, both), tile_for(x.dtype, rows, both), both // 2
    if features > inputs and rows <= tile.rows:
        return gated_act(linear(x, weight, bias), activation)
    out = x.new_empty(rows, dim)
    _gated_linear[(triton.cdiv(dim, tile.cols // 2), triton.cdiv(rows, tile.rows))](
        x, weight, bias_or_any, out, rows, dim, features, x.stride(0), inputs,
        activation, triton.cdiv(features, inputs) if inputs else 0, bias is not None, *tile[:3],
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
