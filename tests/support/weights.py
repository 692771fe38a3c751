"""Packed weights for tests: how they are made of plain ones, and how one row of them is changed."""

import torch
from torch import Tensor

from nudging.kernels.weight import Int8Weight, PackedWeight, Weight, pack, whole_panels


def packed(weight: Weight) -> PackedWeight:
    """A packed copy."""
    assert not isinstance(weight, PackedWeight)
    values, scales = weight if isinstance(weight, Int8Weight) else (weight, None)
    out, features = values.shape
    panels = torch.full((whole_panels(out), features), 7, dtype=values.dtype)
    panels[:out] = values
    return pack(panels, out, scales)


def set_row(table: Tensor | PackedWeight, row: int, value: float) -> None:
    """Row `row` of a table of embeddings becomes `value` everywhere."""
    if isinstance(table, PackedWeight):
        plain = table.unpacked()
        assert isinstance(plain, Tensor)
        plain[row] = value
        table.panels.copy_(packed(plain).panels)
    else:
        table[row] = value
