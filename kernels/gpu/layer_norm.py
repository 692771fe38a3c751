"""The layer norm without parameters on a GPU: a program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import sizes
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import total
from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.row import Row


@triton.jit
def _layer_norm(x_ptr, out_ptr, dim, eps, PDL: tl.constexpr, BLOCK: tl.constexpr):
    begin(PDL)
    at = tl.arange(0, BLOCK)
    here = tl.program_id(0).to(tl.int64) * dim + at
    x = tl.load(x_ptr + here, mask=at < dim, other=0.0).to(tl.float32)
    y = tl.where(at < dim, x - total(x, BLOCK) / dim, 0.0)
    y = y * tl.rsqrt(total(y * y, BLOCK) / dim + eps)
    tl.store(out_ptr + here, y.to(out_ptr.dtype.element_ty), mask=at < dim)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    rows, dim = sizes("layer_norm", "x", x, 2)
    x = x.contiguous()
    out = torch.empty_like(x)
    row, config = Row.of("layer_norm", dim), config_of(x.device)
    _layer_norm[(rows,)](x, out, dim, eps, config.pdl, row.block, **config.options(row.warps))
    return out
