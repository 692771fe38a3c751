"""Causal attention of ragged query rows over a paged key-value cache."""

import torch
from torch import Tensor

from .op import Op


@Op
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """softmax(cap(scale * q k^T)) v with fp32 accumulation, returned in q's dtype: [rows, heads, head_dim].

    q: [rows, heads, head_dim]; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim], where heads is a
    multiple of kv_heads; block_tables: [seqs, max_blocks] int32, entries past a sequence's length are never
    read; cu_seqlens_q: [seqs + 1] int32, sequence s owns rows cu[s]..cu[s+1]; seq_lens: [seqs] int32, cached
    tokens including those rows, so the i-th of n query rows stands at position seq_lens - n + i and sees
    positions <= its own, with `window` > 0 only the last `window` of them.  `soft_cap` > 0: logits become
    cap * tanh(logits / cap).
    """
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[2]
    block_size = k_cache.shape[1]
    for s in range(len(seq_lens)):
        first, last, length = int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]), int(seq_lens[s])
        if first == last:
            continue
        blocks = block_tables[s, : -(-length // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        v = v_cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q[first:last].float(), k) * scale
        if soft_cap > 0:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        at = torch.arange(length - (last - first), length, device=q.device)[:, None]
        seen = torch.arange(length, device=q.device)[None, :]
        hidden = seen > at
        if window > 0:
            hidden |= seen <= at - window
        probs = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", probs, v).to(q.dtype)
    return out
