"""The residual sum and the root-mean-square norm that follows it, in one pass."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .cuda import on_cuda
from .op import Op
from .rms_norm import rms_norm


@Op
def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """x + y, rounded to x's dtype, and rms_norm of that: two tensors of [rows, dim].

    x, y: [rows, dim] of one dtype; weight, eps, unit_offset: as in rms_norm.
    """
    total = x + y
    return total, rms_norm.reference(total, weight, eps, unit_offset)


@add_rms_norm.impl("cpu", runs_on=lambda x, y, weight, eps, unit_offset=False: on_cpu(x))
def _add_rms_norm_cpu(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, unit_offset: bool = False, isa: _C.Isa = BEST
) -> tuple[Tensor, Tensor]:
    rows, dim = sizes("add_rms_norm", "x", x, 2)
    x = x.contiguous()
    y = require("add_rms_norm", "y", y, (rows, dim), x.dtype)
    weight = require("add_rms_norm", "weight", weight, (dim,), x.dtype)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _C.add_rms_norm(
        isa,
        team(),
        DTYPES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        rows,
        dim,
        eps,
        unit_offset,
    )
    return total, out


add_rms_norm.impl_at(
    "triton",
    runs_on=lambda x, y, weight, eps, unit_offset=False: on_cuda(x),
    at="nudging.kernels.gpu.add_rms_norm:add_rms_norm",
)
