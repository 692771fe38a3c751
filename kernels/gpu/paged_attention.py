"""Paged attention on a GPU: one order of additions for decode, verification and prefill.

The keys of a sequence are cut by position into splits of SPLIT keys, and a split into tiles.  A query row's
share of a split is an online softmax over its tiles in order; its result is the shares merged in order.  All
sums over keys are matrix products of 16 rows, so no sum depends on how a block is laid out over threads, and
a tile or split that a row does not see leaves its bits as they are.  Hence a row's bits depend on its own
query and keys alone, and splits may run in programs of their own (few rows: `_attend_split`, `_merge_splits`)
or in one (many rows: `_attend_whole`), whichever fills the device.  The last of a row's programs merges its
shares, where they can be counted (`arrivals`), else a launch of its own does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.cuda import ARRIVALS
from nudging.kernels.gpu.common.arrivals import arrives_last, check_arrivals
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import cap_logits
from nudging.kernels.gpu.common.pdl import begin

SPLIT = 128  # Keys per split, a multiple of every tile.
ROWS = 16  # Query rows, times heads of a group, of a program: the rows of one matrix instruction.
ENOUGH_PROGRAMS = 512  # From here on a program takes all splits of its rows, and
MOST_SHARES = 16384  # where there would be more shares than this to keep: 136 MB for heads of 128.


@triton.jit
def rows_of(cu_ptr, lens_ptr, seqs, window, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence and query rows of this program, and the positions [low, high) that they see.

    A sequence's rows times heads of a group are cut into tiles of ROWS; those of sequence s begin at number
    cu[s] * GROUP // ROWS + s, which leaves gaps but can be found without the host.
    """
    tile = tl.program_id(0)
    seq, end = tl.full((), 0, tl.int32), seqs
    while end - seq > 1:
        middle = (seq + end) // 2
        begins = tl.load(cu_ptr + middle) * GROUP // ROWS + middle
        seq = tl.where(begins <= tile, middle, seq)
        end = tl.where(begins <= tile, end, middle)
    first = tl.load(cu_ptr + seq)
    rows = tl.load(cu_ptr + seq + 1) - first
    start = (tile - first * GROUP // ROWS - seq) * ROWS
    before = tl.load(lens_ptr + seq) - rows
    low = tl.maximum(before + start // GROUP - window + 1, 0) if window > 0 else 0
    last = tl.minimum(start + ROWS, rows * GROUP) - 1
    high = before + last // GROUP + 1
    if start >= rows * GROUP:
        high = low
    index = start + tl.arange(0, ROWS)
    at = tl.where(index < rows * GROUP, before + index // GROUP, -1)
    return seq, first + index // GROUP, index % GROUP, at, low, high


@triton.jit
def merged(m, total, acc, m2, total2, acc2):
    """Two shares of a softmax, as one: maxima, sums of weights, and weighted sums of values."""
    top = tl.maximum(m, m2)
    base = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp(m - base), tl.exp(m2 - base)
    return top, total * a + total2 * b, acc * a[:, None] + acc2 * b[:, None]


@triton.jit
def weighted(p, v, acc):
    """acc + p @ v, where p in fp32 is carried by two values of v's 16-bit type."""
    if v.dtype == tl.float32:
        return tl.dot(p, v, acc, input_precision="ieee")
    coarse = p.to(v.dtype)
    acc = tl.dot(coarse, v, acc)
    return tl.dot((p - coarse.to(tl.float32)).to(v.dtype), v, acc)


@triton.jit
def share(
    q, at, low, high, split, k_ptr, v_ptr, table_ptr, scale, window, soft_cap, stride,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    SPLIT: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The rows' share of one split: maxima, sums and weighted sums, the latter relative to the maxima."""
    d = tl.arange(0, DIM)
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    # All 16 columns are the sum of the weights.
    total = tl.zeros([q.shape[0], 16], tl.float32)
    acc = tl.zeros([q.shape[0], DIM], tl.float32)
    ones = tl.full([KEYS, 16], 1.0, v_ptr.dtype.element_ty)
    begin = tl.maximum(split * SPLIT, low // KEYS * KEYS)
    for start in range(begin, tl.minimum(split * SPLIT + SPLIT, high), KEYS):
        pos = start + tl.arange(0, KEYS)
        # What no row of the tile sees is not read: it may be freed, or never written.
        held = (pos >= low) & (pos < high)
        block = tl.load(table_ptr + pos // BLOCK, mask=held, other=0).to(tl.int64)
        offset = (block * BLOCK + pos % BLOCK)[:, None] * stride + d[None, :]
        mask = held[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offset, mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            logits = cap_logits(logits, soft_cap)
        seen = (pos[None, :] <= at[:, None]) & held[None, :]
        if window > 0:
            seen = seen & (pos[None, :] > at[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(m, tl.max(logits, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(logits - base[:, None])
        keep = tl.exp(m - base)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)
        # What is not finite must reach the rows that see it and, although its weight is 0, no other.
        if tl.max(tl.where((at >= 0)[:, None] & (seen == 0), 1, 0)) > 0:
            sound = tl.min((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32), 1) > 0
            p = tl.where(seen & (sound == 0)[None, :], float("nan"), p)
            v = tl.where(sound[:, None], v, 0.0)
        total = weighted(p, ones, total * keep[:, None])
        acc = weighted(p, v, acc * keep[:, None])
        m = top
    return m, tl.max(total, 1), acc


@triton.jit
def queries(q_ptr, row, head, at, row_stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    offset = row.to(tl.int64)[:, None] * row_stride + head[:, None] * HEAD_DIM + d[None, :]
    return tl.load(q_ptr + offset, mask=(at >= 0)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def finish(out_ptr, row, head, at, total, acc, row_stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    offset = row.to(tl.int64)[:, None] * row_stride + head[:, None] * HEAD_DIM + d[None, :]
    out = acc / tl.where(at >= 0, total, 1.0)[:, None]
    mask = (at >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend_whole(
    q_ptr, k_ptr, v_ptr, out_ptr, tables_ptr, cu_ptr, lens_ptr,
    seqs, heads, table_width, scale, window, soft_cap, q_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    SPLIT: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows and key-value head: all splits in order."""
    begin(PDL)
    seq, row, group, at, low, high = rows_of(cu_ptr, lens_ptr, seqs, window, GROUP, ROWS)
    if low < high:
        kv_head = tl.program_id(1)
        head = kv_head * GROUP + group
        stride = heads // GROUP * HEAD_DIM
        q = queries(q_ptr, row, head, at, q_stride, HEAD_DIM, DIM)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for split in range(low // SPLIT, tl.cdiv(high, SPLIT)):
            m2, total2, acc2 = share(
                q, at, low, high, split, k_ptr + kv_head * HEAD_DIM, v_ptr + kv_head * HEAD_DIM,
                tables_ptr + seq.to(tl.int64) * table_width, scale, window, soft_cap, stride,
                HEAD_DIM, BLOCK, CAPPED, SPLIT, DIM, KEYS,
            )  # fmt: skip
            m, total, acc = merged(m, total, acc, m2, total2, acc2)
        finish(out_ptr, row, head, at, total, acc, heads * HEAD_DIM, HEAD_DIM, DIM)


@triton.jit
def _attend_split(
    q_ptr, k_ptr, v_ptr, parts_ptr, out_ptr, arrivals_ptr, tables_ptr, cu_ptr, lens_ptr,
    seqs, heads, table_width, scale, window, soft_cap, q_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    SPLIT: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
    MERGES: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows, key-value head and split: its share, [ROWS, 2 + DIM], into `parts`.

    MERGES: the last of a tile and head merges the shares.
    """
    begin(PDL)
    seq, row, group, at, low, high = rows_of(cu_ptr, lens_ptr, seqs, window, GROUP, ROWS)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if tl.maximum(low, split * SPLIT) < tl.minimum(high, split * SPLIT + SPLIT):
        head = kv_head * GROUP + group
        stride = heads // GROUP * HEAD_DIM
        q = queries(q_ptr, row, head, at, q_stride, HEAD_DIM, DIM)
        m, total, acc = share(
            q, at, low, high, split, k_ptr + kv_head * HEAD_DIM, v_ptr + kv_head * HEAD_DIM,
            tables_ptr + seq.to(tl.int64) * table_width, scale, window, soft_cap, stride,
            HEAD_DIM, BLOCK, CAPPED, SPLIT, DIM, KEYS,
        )  # fmt: skip
        tile = tl.program_id(0) * tl.num_programs(1) + kv_head
        parts_ptr += tile.to(tl.int64) * tl.num_programs(2) * ROWS * (DIM + 2)
        part_ptr = parts_ptr + split * ROWS * (DIM + 2)
        i, d = tl.arange(0, ROWS), tl.arange(0, DIM)
        tl.store(part_ptr + i, m, mask=at >= 0)
        tl.store(part_ptr + ROWS + i, total, mask=at >= 0)
        tl.store(part_ptr + 2 * ROWS + i[:, None] * DIM + d[None, :], acc, mask=(at >= 0)[:, None])
        if MERGES:  # noqa: SIM102
            if arrives_last(arrivals_ptr + tile, tl.cdiv(high, SPLIT) - low // SPLIT):
                total, acc = all_shares(parts_ptr, at, low, high, SPLIT, DIM, ROWS)
                finish(out_ptr, row, head, at, total, acc, heads * HEAD_DIM, HEAD_DIM, DIM)


@triton.jit
def all_shares(
    parts_ptr, at, low, high, SPLIT: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The shares of a tile of rows and key-value head, merged in order: sums and weighted sums.

    Of the rows that there are: those of one token are a few of a tile.
    """
    i, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.range(low // SPLIT, tl.cdiv(high, SPLIT), num_stages=4):
        one = parts_ptr + split * ROWS * (DIM + 2)
        m2 = tl.load(one + i, mask=at >= 0, other=float("-inf"), cache_modifier=".cg")
        total2 = tl.load(one + ROWS + i, mask=at >= 0, other=0.0, cache_modifier=".cg")
        acc2 = tl.load(
            one + 2 * ROWS + i[:, None] * DIM + d[None, :],
            mask=(at >= 0)[:, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m, total, acc = merged(m, total, acc, m2, total2, acc2)
    return total, acc


@triton.jit
def _merge_splits(
    parts_ptr, out_ptr, cu_ptr, lens_ptr, seqs, heads, window, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows and key-value head: its shares, merged in order."""
    seq, row, group, at, low, high = rows_of(cu_ptr, lens_ptr, seqs, window, GROUP, ROWS)
    if low < high:
        kv_head = tl.program_id(1)
        part = (tl.program_id(0) * tl.num_programs(1) + kv_head).to(tl.int64) * splits
        total, acc = all_shares(parts_ptr + part * ROWS * (DIM + 2), at, low, high, SPLIT, DIM, ROWS)
        head = kv_head * GROUP + group
        finish(out_ptr, row, head, at, total, acc, heads * HEAD_DIM, HEAD_DIM, DIM)


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
    enough_programs: int = ENOUGH_PROGRAMS,
) -> Tensor:
    op = "paged_attention"
    rows, heads, head_dim = sizes(op, "q", q, 3)
    blocks, block_size, kv_heads, _ = sizes(op, "k_cache", k_cache, 4)
    seqs, max_blocks = sizes(op, "block_tables", block_tables, 2)
    cache_shape = (blocks, block_size, kv_heads, head_dim)
    k_cache = require(op, "k_cache", k_cache, cache_shape, q.dtype, q.device)
    v_cache = require(op, "v_cache", v_cache, cache_shape, q.dtype, q.device)
    block_tables = require(op, "block_tables", block_tables, (seqs, max_blocks), torch.int32, q.device)
    cu_seqlens_q = require(op, "cu_seqlens_q", cu_seqlens_q, (seqs + 1,), torch.int32, q.device)
    seq_lens = require(op, "seq_lens", seq_lens, (seqs,), torch.int32, q.device)
    if window < 0:
        raise ValueError(f"{op}: window is {window}, it must be 0 (none) or more")
    # Queries that are a slice of a projection are read where they lie.
    if q.stride()[1:] != (head_dim, 1):
        q = q.contiguous()
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    tiles = rows * group // ROWS + seqs
    splits = triton.cdiv(max_blocks * block_size, SPLIT)
    config = config_of(q.device)
    dim, keys, warps, stages = config.keys(q.dtype, head_dim)
    runs = config.options(warps, stages)
    cache = (block_tables, cu_seqlens_q, seq_lens, seqs, heads, max_blocks)
    shape = (group, head_dim, block_size, soft_cap > 0, SPLIT, dim, keys, ROWS, config.pdl)
    if rows == 0:
        return out
    programs = tiles * kv_heads
    if splits == 1 or programs >= enough_programs or programs * splits > MOST_SHARES:
        _attend_whole[(tiles, kv_heads)](
            q, k_cache, v_cache, out, *cache, scale, window, soft_cap, q.stride(0), *shape, **runs
        )
        return out
    if arrivals is not None:
        arrivals = check_arrivals(op, arrivals, q) if programs <= ARRIVALS else None
    parts = torch.empty((tiles, kv_heads, splits, ROWS * (dim + 2)), dtype=torch.float32, device=q.device)
    _attend_split[(tiles, kv_heads, splits)](
        q, k_cache, v_cache, parts, out, out if arrivals is None else arrivals, *cache,
        scale, window, soft_cap, q.stride(0), *shape, arrivals is not None, **runs,
    )  # fmt: skip
    if arrivals is not None:
        return out
    _merge_splits[(tiles, kv_heads)](
        parts, out, cu_seqlens_q, seq_lens, seqs, heads, window, splits, group, head_dim, SPLIT, dim, ROWS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
