"""Layer normalisation without parameters (OLMo 1)."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, sizes, team
from .cuda import on_cuda
from .op import Op


@Op
def layer_norm(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, in fp32, in x's dtype.  x: [rows, dim]."""
    y = x.float()
    y = y - y.mean(dim=-1, keepdim=True)
    return (y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


@layer_norm.impl("cpu", runs_on=lambda x, eps: on_cpu(x))
def _layer_norm_cpu(x: Tensor, eps: float, isa: _C.Isa = BEST) -> Tensor:
    rows, dim = sizes("layer_norm", "x", x, 2)
    x = x.contiguous()
    out = torch.empty_like(x)
    _C.layer_norm(isa, team(), DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), rows, dim, eps)
    return out


layer_norm.impl_at(
    "triton",
    runs_on=lambda x, eps: on_cuda(x),
    at="nudging.kernels.gpu.layer_norm:layer_norm",
)
