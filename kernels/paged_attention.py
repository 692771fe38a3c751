"""Causal attention of ragged query rows over a paged key-value cache."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .cuda import on_cuda
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
    arrivals: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale * q k^T)) v with fp32 accumulation, returned in q's dtype: [rows, heads, head_dim].

    q: [rows, heads, head_dim]; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim], where heads is a
    multiple of kv_heads; block_tables: [seqs, max_blocks] int32, entries past a sequence's length are never
    read; cu_seqlens_q: [seqs + 1] int32, sequence s owns rows cu[s]..cu[s+1]; seq_lens: [seqs] int32, cached
    tokens including those rows, so the i-th of n query rows stands at position seq_lens - n + i and sees
    positions <= its own, with `window` > 0 only the last `window` of them.  `soft_cap` > 0: logits become
    cap * tanh(logits / cap).  `arrivals`: see cuda.py.
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


def _runs_on_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    arrivals: Tensor | None = None,
) -> bool:
    return on_cpu(q) and q.shape[2] <= _C.MAX_HEAD_DIM


@paged_attention.impl("cpu", runs_on=_runs_on_cpu)
def _paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    arrivals: Tensor | None = None,
    isa: _C.Isa = BEST,
) -> Tensor:
    op = "paged_attention"
    rows, heads, head_dim = sizes(op, "q", q, 3)
    blocks, block_size, kv_heads, _ = sizes(op, "k_cache", k_cache, 4)
    seqs, max_blocks = sizes(op, "block_tables", block_tables, 2)
    q = q.contiguous()
    cache_shape = (blocks, block_size, kv_heads, head_dim)
    k_cache = require(op, "k_cache", k_cache, cache_shape, q.dtype)
    v_cache = require(op, "v_cache", v_cache, cache_shape, q.dtype)
    block_tables = require(op, "block_tables", block_tables, (seqs, max_blocks), torch.int32)
    cu_seqlens_q = require(op, "cu_seqlens_q", cu_seqlens_q, (seqs + 1,), torch.int32)
    seq_lens = require(op, "seq_lens", seq_lens, (seqs,), torch.int32)
    out = torch.empty_like(q)
    _C.paged_attention(
        isa,
        team(),
        DTYPES[q.dtype],
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        block_tables.data_ptr(),
        cu_seqlens_q.data_ptr(),
        seq_lens.data_ptr(),
        rows,
        seqs,
        heads,
        kv_heads,
        head_dim,
        blocks,
        block_size,
        max_blocks,
        scale,
        window,
        soft_cap,
    )
    return out


def _runs_on_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    arrivals: Tensor | None = None,
) -> bool:
    return on_cuda(q) and q.shape[2] <= 256


paged_attention.impl_at(
    "triton", runs_on=_runs_on_cuda, at="nudging.kernels.gpu.paged_attention:paged_attention"
)
