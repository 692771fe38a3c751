"""The residual sum and its norm on a GPU: a program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import rms_normed
from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.row import Row


@triton.jit
def _add_rms_norm(
    x_ptr, y_ptr, y_weight_ptr, weight_ptr, sum_ptr, out_ptr, dim, eps,
    HAS_Y_WEIGHT: tl.constexpr, HAS_WEIGHT: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    at = tl.arange(0, BLOCK)
    here = tl.program_id(0).to(tl.int64) * dim + at
    dtype = sum_ptr.dtype.element_ty
    x = tl.load(x_ptr + here, mask=at < dim, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + here, mask=at < dim, other=0.0).to(tl.float32)
    if HAS_Y_WEIGHT:
        weight = tl.load(y_weight_ptr + at, mask=at < dim, other=0.0).to(tl.float32)
        y = rms_normed(y, weight, dim, eps, UNIT_OFFSET, BLOCK).to(dtype).to(tl.float32)
    # Rounded before it is normalised, as it would be between two ops.
    summed = (x + y).to(dtype)
    tl.store(sum_ptr + here, summed, mask=at < dim)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + at, mask=at < dim, other=0.0).to(tl.float32)
        y = rms_normed(summed.to(tl.float32), weight, dim, eps, UNIT_OFFSET, BLOCK)
        tl.store(out_ptr + here, y.to(dtype), mask=at < dim)


def add_rms_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool = False,
    y_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    op = "add_rms_norm"
    rows, dim = sizes(op, "x", x, 2)
    x = x.contiguous()
    y = require(op, "y", y, (rows, dim), x.dtype, x.device)
    if weight is not None:
        weight = require(op, "weight", weight, (dim,), x.dtype, x.device)
    if y_weight is not None:
        y_weight = require(op, "y_weight", y_weight, (dim,), x.dtype, x.device)
    summed = torch.empty_like(x)
    out = summed if weight is None else torch.empty_like(x)
    row, config = Row.of(op, dim), config_of(x.device)
    _add_rms_norm[(rows,)](
        x, y, x if y_weight is None else y_weight, x if weight is None else weight, summed, out, dim, eps,
        y_weight is not None, weight is not None, unit_offset, config.pdl, row.block,
        **config.options(row.warps),
    )  # fmt: skip
    return summed, out
