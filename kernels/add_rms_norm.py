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
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool = False,
    y_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + y, rounded to x's dtype, and rms_norm of that, or the same where there is no weight: [rows, dim].

    x, y: [rows, dim] of one dtype; weight, eps, unit_offset: as in rms_norm; with `y_weight` rms_norm of y by
    that weight is what is added.
    """
    if y_weight is not None:
        y = rms_norm.reference(y, y_weight, eps, unit_offset)
    total = x + y
    return total, total if weight is None else rms_norm.reference(total, weight, eps, unit_offset)


@add_rms_norm.impl("cpu", runs_on=lambda x, *_, **__: on_cpu(x))
def _add_rms_norm_cpu(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool = False,
    y_weight: Tensor | None = None,
    isa: _C.Isa = BEST,
) -> tuple[Tensor, Tensor]:
    if y_weight is not None:
        y = rms_norm(y, y_weight, eps, unit_offset)
    if weight is None:
        total = x + y
        return total, total
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
    runs_on=lambda x, *_, **__: on_cuda(x),
    at="nudging.kernels.gpu.add_rms_norm:add_rms_norm",
)
