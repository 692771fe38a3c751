"""The ragged batch of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """One pass's attention over its paged cache, where the batch says how."""

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, window: int, soft_cap: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Rows of all sequences of one model in one step, concatenated.

    ids, positions, slot_mapping: [rows] int64, the ids also otherwise, as `embed` takes them; cu_seqlens_q:
    [seqs + 1] int32; seq_lens: [seqs] int32, tokens in the cache after this step; block_tables: [seqs,
    max_blocks] int32; logit_rows: [n] int64, the rows whose logits are wanted.  `attention`: what runs it
    where that is not the op `paged_attention`.
    """

    ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    attention: Attention | None = None
