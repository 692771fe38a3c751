"""Matrix product with a weight: the op that reads almost all bytes of a step."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .cuda import on_cuda
from .op import Op


@Op
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x @ weight.T + bias, accumulated in fp32: [rows, out] of `out_dtype` (x's dtype when None).

    x: [rows, in]; weight: [out, in] of x's dtype; bias: [out] of x's dtype or None.  `out_dtype` is x's dtype
    or fp32: the LM head asks for fp32 so that bf16 rounding does not make ties among logits.
    Processors that multiply pairs of bf16 take subnormal ones (below 1.2e-38) for zero.
    """
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype or x.dtype)


@linear.impl("cpu", runs_on=lambda x, weight, bias=None, out_dtype=None: on_cpu(x))
def _linear_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    isa: _C.Isa = BEST,
) -> Tensor:
    rows, features = sizes("linear", "x", x, 2)
    cols = sizes("linear", "weight", weight, 2)[0]
    x = x.contiguous()
    weight = require("linear", "weight", weight, (cols, features), x.dtype)
    if bias is not None:
        bias = require("linear", "bias", bias, (cols,), x.dtype)
    dtype = x.dtype
    out = x.new_empty(rows, cols) if out_dtype is None else x.new_empty((rows, cols), dtype=out_dtype)
    if out_dtype is not None and out_dtype not in (dtype, torch.float32):
        raise ValueError(
            f"linear: out_dtype is {out_dtype}; only x's {dtype} and torch.float32 can be asked for"
        )
    _C.linear(
        isa,
        team(),
        DTYPES[dtype],
        DTYPES[out_dtype or dtype],
        x.data_ptr(),
        weight.data_ptr(),
        0,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        features,
        cols,
    )
    return out


linear.impl_at(
    "triton",
    runs_on=lambda x, weight, bias=None, out_dtype=None: on_cuda(x),
    at="nudging.kernels.gpu.linear:linear",
)
