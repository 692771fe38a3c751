"""The ragged batch of one model's step, and the block-paged cache it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of all sequences of one model in one step, concatenated.

    ids, positions, slot_mapping: [rows] int64; cu_seqlens_q: [seqs + 1] int32; seq_lens: [seqs] int32, tokens
    in the cache after this step; block_tables: [seqs, max_blocks] int32; logit_rows: [n] int64, the rows
    whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor


class KVCache:
    """One model's keys and values: two tensors of [layers, blocks, block_size, kv_heads, head_dim]."""

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
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.block_size = block_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer: two views of [blocks, block_size, kv_heads, head_dim]."""
        return self.k[index], self.v[index]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, in every layer: the copy of copy-on-write."""
        if pairs:
            source, destination = zip(*pairs, strict=True)
            self.k[:, list(destination)] = self.k[:, list(source)]
            self.v[:, list(destination)] = self.v[:, list(source)]
