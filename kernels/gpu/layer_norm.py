"""The layer norm without parameters on a GPU: a program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..check import sizes
from .math import total
from .row import Row


@triton.jit
def _layer_norm(x_ptr, out_ptr, dim, eps, BLOCK: tl.constexpr):
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
    row = Row.of("layer_norm", dim)
    _layer_norm[(rows,)](x, out, dim, eps, row.block, num_warps=row.warps, enable_fp_fusion=False)
    return out
