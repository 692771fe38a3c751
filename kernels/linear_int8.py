"""Matrix product with an int8 weight: half the bytes of a 16-bit one."""

from typing import NamedTuple

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .op import Op


class Int8Weight(NamedTuple):
    """A weight [out, in] as `values` [out, in] int8 and `scales` [out] fp32: values * scales[:, None]."""

    values: Tensor
    scales: Tensor


def quantize_int8(weight: Tensor) -> Int8Weight:
    """The nearest int8 weight, symmetric: an output channel's scale is its largest magnitude / 127."""
    w = weight.float()
    scales = w.abs().amax(dim=1) / 127
    # A row of zeros has scale 0, and 0 / 0 is taken for 0.
    values = (w / scales[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    return Int8Weight(values.to(torch.int8), scales)


@Op
def linear_int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x @ weight.T) * scales + bias, accumulated in fp32: [rows, out] of `out_dtype` (x's dtype when None).

    x: [rows, in]; weight: [out, in] int8; scales: [out] fp32; bias: [out] of x's dtype or None; `out_dtype`
    is x's dtype or fp32.
    """
    out = (x.float() @ weight.float().T) * scales
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype or x.dtype)


@linear_int8.impl("cpu", runs_on=lambda x, weight, scales, bias=None, out_dtype=None: on_cpu(x))
def _linear_int8_cpu(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    isa: _C.Isa = BEST,
) -> Tensor:
    op, dtype = "linear_int8", x.dtype
    rows, features = sizes(op, "x", x, 2)
    cols = sizes(op, "weight", weight, 2)[0]
    x = x.contiguous()
    weight = require(op, "weight", weight, (cols, features), torch.int8)
    scales = require(op, "scales", scales, (cols,), torch.float32)
    if bias is not None:
        bias = require(op, "bias", bias, (cols,), dtype)
    if out_dtype not in (None, dtype, torch.float32):
        raise ValueError(
            f"{op}: out_dtype is {out_dtype}; only x's {dtype} and torch.float32 can be asked for"
        )
    out = x.new_empty((rows, cols), dtype=out_dtype or dtype)
    _C.linear(
        isa,
        team(),
        DTYPES[dtype],
        DTYPES[out_dtype or dtype],
        x.data_ptr(),
        weight.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        features,
        cols,
    )
    return out
