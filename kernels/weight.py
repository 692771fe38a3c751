"""What a product reads: a weight as it is, or int8 with a scale for each output channel."""

from typing import NamedTuple

import torch
from torch import Tensor


class Int8Weight(NamedTuple):
    """A weight [out, in] as `values` [out, in] int8 and `scales` [out] fp32: values * scales[:, None]."""

    values: Tensor
    scales: Tensor


Weight = Tensor | Int8Weight


def quantize_int8(weight: Tensor) -> Int8Weight:
    """The nearest int8 weight, symmetric: an output channel's scale is its largest magnitude / 127."""
    w = weight.float()
    scales = w.abs().amax(dim=1) / 127
    # A row of zeros has scale 0, and 0 / 0 is taken for 0.
    values = (w / scales[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    return Int8Weight(values.to(torch.int8), scales)


def values_of(weight: Weight) -> Tensor:
    """The tensor with an entry for each parameter."""
    return weight.values if isinstance(weight, Int8Weight) else weight
