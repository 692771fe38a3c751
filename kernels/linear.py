"""Matrix product with a weight: the op that reads almost all bytes of a step."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .cuda import on_cuda
from .op import Op
from .rms_norm import Norm, rms_norm
from .weight import Int8Weight, PackedWeight, Weight, parts_of, whole_panels


def product(x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None) -> Tensor:
    """The definition of every product: `linear` before it is rounded, [rows, out] fp32."""
    if norm is not None:
        x = rms_norm.reference(x, norm.weight, norm.eps, norm.unit_offset)
    if isinstance(weight, PackedWeight):
        weight = weight.unpacked()
    if isinstance(weight, Int8Weight):
        out = (x.float() @ weight.values.float().T) * weight.scales
    else:
        out = x.float() @ weight.float().T
    return out if bias is None else out + bias.float()


@Op
def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """x @ weight.T + bias, accumulated in fp32: [rows, out] of `out_dtype` (x's dtype when None).

    x: [rows, in], with `norm` normalised first, as rms_norm does it; weight: [out, in] of x's dtype, or int8,
    where the sums are multiplied by the scales, or either of them packed, which only C++ reads (and fastest);
    bias: [out] of x's dtype or None.  `out_dtype` is x's dtype or fp32: the LM head asks for fp32 so that
    bf16 rounding does not make ties among logits.
    Processors that multiply pairs of bf16 take subnormal ones (below 1.2e-38) for zero.
    """
    return product(x, weight, bias, norm).to(out_dtype or x.dtype)


@linear.impl("cpu", runs_on=lambda x, weight, bias=None, out_dtype=None, norm=None: on_cpu(x))
def _linear_cpu(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    norm: Norm | None = None,
    isa: _C.Isa = BEST,
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, norm.unit_offset)
    rows, features = sizes("linear", "x", x, 2)
    x, dtype, is_packed = x.contiguous(), x.dtype, isinstance(weight, PackedWeight)
    values, scales = parts_of(weight)
    held = sizes("linear", "weight", values, 2)[0]
    cols = weight.out if isinstance(weight, PackedWeight) else held
    kind = dtype if scales is None else torch.int8
    values = require("linear", "weight", values, (whole_panels(cols) if is_packed else cols, features), kind)
    if scales is not None:
        scales = require("linear", "scales", scales, (cols,), torch.float32)
    if bias is not None:
        bias = require("linear", "bias", bias, (cols,), dtype)
    if out_dtype is not None and out_dtype not in (dtype, torch.float32):
        raise ValueError(
            f"linear: out_dtype is {out_dtype}; only x's {dtype} and torch.float32 can be asked for"
        )
    out = x.new_empty(rows, cols) if out_dtype is None else x.new_empty((rows, cols), dtype=out_dtype)
    _C.linear(
        isa,
        team(),
        DTYPES[dtype],
        DTYPES[out_dtype or dtype],
        x.data_ptr(),
        values.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        features,
        cols,
        is_packed,
    )
    return out


linear.impl_at(
    "triton",
    runs_on=lambda x, weight, bias=None, out_dtype=None, norm=None: on_cuda(x),
    at="nudging.kernels.gpu.linear:linear",
)
