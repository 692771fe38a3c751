"""What a product reads: a weight as it is, int8 with a scale for each output channel, or either packed."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from nudging import _C

from .cpu import team

TYPES = {
    torch.float32: _C.WeightType.f32,
    torch.bfloat16: _C.WeightType.bf16,
    torch.float16: _C.WeightType.f16,
    torch.int8: _C.WeightType.int8,
}


class Int8Weight(NamedTuple):
    """A weight [out, in] as `values` [out, in] int8 and `scales` [out] fp32: values * scales[:, None]."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in the order in which the CPU's `linear` reads it: see csrc/cpu/panels.h.

    panels: [out in whole panels, in], its elements in that order; scales: [out] fp32 where they are int8.
    """

    panels: Tensor
    out: int
    scales: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.panels.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the elements; scales and what fills up the last panel do not count."""
        return prod(self.shape) * self.dtype.itemsize

    def columns(self, ids: Tensor) -> Tensor:
        """The columns `ids`, [n] int32 or int64, as rows: [n, in].  ValueError for one that is none."""
        out, features = self.shape
        ids = ids.long().contiguous()
        found = self.panels.new_empty(len(ids), features)
        args = TYPES[self.dtype], self.panels.data_ptr(), features, out, ids.data_ptr(), len(ids)
        _C.unpack_columns(*args, found.data_ptr())
        return found

    def unpacked(self) -> Tensor | Int8Weight:
        """A copy, as it was before."""
        values = self.columns(torch.arange(self.out))
        return values if self.scales is None else Int8Weight(values, self.scales)


Weight = Tensor | Int8Weight | PackedWeight


def whole_panels(out: int) -> int:
    """`out` columns with those that fill up the last panel."""
    return -(-out // _C.PANEL) * _C.PANEL


def pack(panels: Tensor, out: int, scales: Tensor | None = None) -> PackedWeight:
    """The weight whose first `out` of `panels` [whole panels, in] are its columns, packed in place."""
    _C.pack_weight(team(), TYPES[panels.dtype], panels.data_ptr(), panels.shape[1], out)
    return PackedWeight(panels, out, scales)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """The nearest int8 weight, symmetric: an output channel's scale is its largest magnitude / 127."""
    w = weight.float()
    scales = w.abs().amax(dim=1) / 127
    # A row of zeros has scale 0, and 0 / 0 is taken for 0.
    values = (w / scales[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    return Int8Weight(values.to(torch.int8), scales)


def parts_of(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """The tensor that has the parameters, and the scales of int8 ones."""
    if isinstance(weight, PackedWeight):
        return weight.panels, weight.scales
    return weight if isinstance(weight, Int8Weight) else (weight, None)


def num_parameters(weight: Weight) -> int:
    """How many there are in it."""
    return prod(weight.shape) if isinstance(weight, PackedWeight) else parts_of(weight)[0].numel()


def num_bytes(weight: Weight) -> int:
    """What it takes on the device, but for what fills up a packed one."""
    values, scales = parts_of(weight)
    return num_parameters(weight) * values.itemsize + (0 if scales is None else scales.nbytes)


def look_up(weight: Tensor | PackedWeight, ids: Tensor) -> Tensor:
    """Rows `ids`, [n] int32 or int64, of a table [out, in]: [n, in]."""
    # Indexing would wake torch's threads for a few rows, which then spin where ours are to run.
    return weight.columns(ids) if isinstance(weight, PackedWeight) else weight.index_select(0, ids)
