"""Root-mean-square normalisation over the last dimension (arXiv 1910.07467)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, team
from .cuda import on_cuda
from .op import Op


class Norm(NamedTuple):
    """The rms_norm that a product's input has still to pass: its weight [dim], eps and unit_offset.

    `squares`: what the product that wrote the input has added up of its squares, in the order that its device
    adds them; None where it did not.
    """

    weight: Tensor
    eps: float
    unit_offset: bool = False
    squares: Tensor | None = None


@Op
def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last dimension, in fp32, returned in x's dtype and shape.

    x: [..., dim]; weight: [dim]; w is `weight`, or `1 + weight` with `unit_offset` (Gemma).
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    return (y * scale).to(x.dtype)


@rms_norm.impl("cpu", runs_on=lambda x, weight, eps, unit_offset=False: on_cpu(x))
def _rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False, isa: _C.Isa = BEST
) -> Tensor:
    dim = x.shape[-1]
    x = x.contiguous()
    weight = require("rms_norm", "weight", weight, (dim,), x.dtype)
    out = torch.empty_like(x)
    rows = x.numel() // max(dim, 1)
    _C.rms_norm(
        isa,
        team(),
        DTYPES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        dim,
        eps,
        unit_offset,
    )
    return out


rms_norm.impl_at(
    "triton",
    runs_on=lambda x, weight, eps, unit_offset=False: on_cuda(x),
    at="nudging.kernels.gpu.rms_norm:rms_norm",
)
