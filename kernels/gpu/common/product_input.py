"""What a product reads, checked, as its kernels take it."""

from typing import NamedTuple

import torch
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.gpu.common.sums_of_squares import groups_of
from nudging.kernels.gpu.rms_norm import rms_norm
from nudging.kernels.rms_norm import Norm
from nudging.kernels.weight import Int8Weight, PackedWeight, Weight


class Source(NamedTuple):
    """A pointer that is not read is any other tensor's.

    scales: those of an int8 weight; norm, squares, eps: of the norm that x has to pass, where `kind` is 1, or
    2 with a unit offset, and not 0; a row has at most 1 << levels sums of squares.
    """

    x: Tensor
    weight: Tensor
    scales: Tensor
    bias: Tensor
    norm: Tensor
    squares: Tensor
    eps: float
    has_scales: bool
    has_bias: bool
    kind: int
    levels: int

    @classmethod
    def of(cls, op: str, x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None) -> "Source":
        """ValueError for what does not fit; a norm without sums of squares is launched here."""
        if isinstance(weight, PackedWeight):
            raise ValueError(f"{op}: weight is packed for the CPU; load the model with packed=False")
        rows, features = sizes(op, "x", x, 2)
        values, scales = weight if isinstance(weight, Int8Weight) else (weight, None)
        cols = sizes(op, "weight", values, 2)[0]
        dtype = x.dtype if scales is None else torch.int8
        values = require(op, "weight", values, (cols, features), dtype, x.device)
        if scales is not None:
            scales = require(op, "scales", scales, (cols,), torch.float32, x.device)
        if bias is not None:
            bias = require(op, "bias", bias, (cols,), x.dtype, x.device)
        kind, levels, of_norm = 0, 0, (values, values, 0.0)
        if norm is not None and norm.squares is not None:
            norm_weight = require(op, "norm.weight", norm.weight, (features,), x.dtype, x.device)
            sums = groups_of(features)
            squares = require(op, "norm.squares", norm.squares, (rows, sums), torch.float32, x.device)
            kind, levels = 2 if norm.unit_offset else 1, (sums - 1).bit_length()
            of_norm = norm_weight, squares, norm.eps
        elif norm is not None:
            x = rms_norm(x, norm.weight, norm.eps, norm.unit_offset)
        x = x if x.stride(1) == 1 else x.contiguous()
        pointers = x, values, values if scales is None else scales, values if bias is None else bias
        return cls(*pointers, *of_norm, scales is not None, bias is not None, kind, levels)
