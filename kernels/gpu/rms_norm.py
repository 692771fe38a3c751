"""The root-mean-square norm on a GPU: a program per row, which holds the row in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import rms_normed
from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.row import Row


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, inner, outer_stride, inner_stride, dim, eps,
    UNIT_OFFSET: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x_ptr += row // inner * outer_stride + row % inner * inner_stride
    y = tl.load(x_ptr + at, mask=at < dim, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=at < dim, other=0.0).to(tl.float32)
    y = rms_normed(y, weight, dim, eps, UNIT_OFFSET, BLOCK)
    tl.store(out_ptr + row * dim + at, y.to(out_ptr.dtype.element_ty), mask=at < dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    dim = x.shape[-1]
    weight = require("rms_norm", "weight", weight, (dim,), x.dtype, x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Heads that are a slice of a projection are read where they lie.
    if x.dim() != 3 or x.stride(2) != 1:
        x = x.reshape(1, -1, dim).contiguous()
    row, config = Row.of("rms_norm", dim), config_of(x.device)
    _rms_norm[(x.shape[0] * x.shape[1],)](
        x, weight, out, x.shape[1], x.stride(0), x.stride(1), dim, eps,
        unit_offset, config.pdl, row.block, **config.options(row.warps),
    )  # fmt: skip
    return out
