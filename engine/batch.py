"""The ragged batch of one model's step, and the block-paged cache it reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nudging.scheduler import Work

# Unused entries of a block table hold an id that no pool has: reading one fails instead of going unnoticed.
IMPOSSIBLE_BLOCK = 2_147_480_000


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


def build_batch(works: Sequence[Work], block_size: int, device: torch.device) -> Batch:
    """The ragged tensors of one model's work.  The works' blocks must be owned alone and cover their ends."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    cu_seqlens_q = [0]
    logit_rows: list[int] = []
    tables = []
    for work in works:
        sequence = work.request.sequences[work.role]
        rows_before = len(ids) - work.start
        ids += sequence.tokens[work.start : work.end]
        positions += range(work.start, work.end)
        slots += [sequence.block_table.slot(p) for p in range(work.start, work.end)]
        cu_seqlens_q.append(len(ids))
        # The row after tokens[:p] is computed where token p - 1 is fed.
        logit_rows += [rows_before + p - 1 for p in range(work.first_row, work.end + 1)]
        tables.append(sequence.block_table.ids)
    width = max(len(table) for table in tables)
    padded = [table + [IMPOSSIBLE_BLOCK] * (width - len(table)) for table in tables]
    return Batch(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([work.end for work in works], dtype=torch.int32, device=device),
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
    )
