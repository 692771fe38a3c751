"""Root-mean-square normalisation over the last dimension (arXiv 1910.07467)."""

import torch
from torch import Tensor

from .op import Op


@Op
def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last dimension, in fp32, returned in x's dtype and shape.

    x: [..., dim]; weight: [dim]; w is `weight`, or `1 + weight` with `unit_offset` (Gemma).
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    return (y * scale).to(x.dtype)
