"""Layer normalisation without parameters (OLMo 1)."""

import torch
from torch import Tensor

from .op import Op


@Op
def layer_norm(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, in fp32, in x's dtype.  x: [rows, dim]."""
    y = x.float()
    y = y - y.mean(dim=-1, keepdim=True)
    return (y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
