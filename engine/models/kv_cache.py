"""The block-paged cache that a model's passes read and write."""

from __future__ import annotations

import torch
from torch import Tensor

from nudging.kernels.cuda import ARRIVALS


class KVCache:
    """One model's keys and values: two tensors of [layers, blocks + 1, block_size, kv_heads, head_dim].

    The last block is no pool's: rows that pad a batch are written there.  `arrivals`: see kernels/cuda.py;
    passes over one cache never run at the same time.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.spare_slot = num_blocks * block_size
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
        self._layers = tuple(zip(self.k, self.v, strict=True))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer: two views of [blocks, block_size, kv_heads, head_dim]."""
        return self._layers[index]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, in every layer: the copy of copy-on-write."""
        if pairs:
            source, destination = zip(*pairs, strict=True)
            self.k[:, list(destination)] = self.k[:, list(source)]
            self.v[:, list(destination)] = self.v[:, list(source)]
