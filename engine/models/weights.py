"""The weights of a decoder, and the memory that they lie in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nudging import _C
from nudging.kernels.weight import PackedWeight, Weight, parts_of

ALIGNMENT = 64


class Layer(NamedTuple):
    """The weights of one layer; None where the family has none.

    qkv: [q + k + v, hidden], gate_up: [2 * intermediate, hidden], gate first; norms: [dim] of what they
    normalise.
    """

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    attn_norm: Tensor | None = None
    attn_post_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Weights(NamedTuple):
    """All weights of a decoder; `norm` is None for a parameterless one.

    `head` is `embed` itself where tied, unless it is int8: embeddings are looked up as they were given.
    """

    embed: Tensor | PackedWeight
    layers: tuple[Layer, ...]
    norm: Tensor | None
    head: Weight

    def distinct(self) -> list[Weight]:
        """Every weight once."""
        top = (self.embed, self.norm, self.head)
        every = [w for w in (*top, *(w for layer in self.layers for w in layer)) if w is not None]
        return list({parts_of(w)[0].data_ptr(): w for w in every}.values())


class Arena:
    """Memory of a fixed size that tensors are cut from; on the CPU it has large pages where there are any."""

    def __init__(self, size: int, device: torch.device) -> None:
        if device.type == "cpu":
            self._memory = torch.frombuffer(_C.Pages(size), dtype=torch.uint8)
        else:
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, its values not set."""
        size = math.prod(shape) * dtype.itemsize
        part = self._memory[self._used : self._used + size]
        self._used += aligned(size)
        return part.view(dtype).view(shape)


def aligned(size: int) -> int:
    """The bytes that a tensor of `size` bytes takes of an arena."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def arena_size(tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """The bytes of an arena for tensors of these shapes and dtypes."""
    return sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in tensors)
