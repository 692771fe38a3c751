"""QKV projection, RoPE and cache append on a GPU: a program computes pairs of channels of one head."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.cuda import ARRIVALS
from nudging.kernels.gpu.common.arrivals import arrives_last, check_arrivals
from nudging.kernels.gpu.common.configs import FEW_ROWS, config_of
from nudging.kernels.gpu.common.product_input import Source
from nudging.kernels.gpu.common.stats import tree_sum
from nudging.kernels.gpu.common.tile import (
    SHARES,
    all_partitions,
    begin_product,
    finished,
    partition,
    split_pairs,
)
from nudging.kernels.gpu.kv_append import check_cache
from nudging.kernels.gpu.linear import linear
from nudging.kernels.gpu.rope import rotated
from nudging.kernels.gpu.rope_append import rope_append
from nudging.kernels.linear_rope_append import split_heads
from nudging.kernels.rms_norm import Norm
from nudging.kernels.rope_append import HeadNorm
from nudging.kernels.weight import Weight


@triton.jit
def store_pairs(to_ptr, row, j, half, a, b, mask):
    """Channels j and half + j of the heads that begin at `row`."""
    at = row[:, None] + j[None, :]
    tl.store(to_ptr + at, a.to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + at + half, b.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def turn(
    a, b, r, j, head, position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, slot_ptr,
    rows, max_position, slots, heads, kv_heads, half,
):  # fmt: skip
    """Store pairs j of a head of queries or keys, [rows, pairs] in fp32, turned by their rows' angles."""
    mask = (r < rows)[:, None] & (j < half)[None, :]
    position = tl.load(position_ptr + r, mask=r < rows, other=-1)
    known = mask & ((position >= 0) & (position < max_position))[:, None]
    angle = position[:, None] * half + j[None, :]
    cosine = tl.load(cos_ptr + angle, mask=known, other=float("nan"))
    sine = tl.load(sin_ptr + angle, mask=known, other=float("nan"))
    a, b = rotated(a, b, cosine, sine)
    if head < heads:
        store_pairs(out_ptr, (r.to(tl.int64) * heads + head) * 2 * half, j, half, a, b, mask)
    else:
        slot = tl.load(slot_ptr + r, mask=r < rows, other=-1)
        fits = mask & ((slot >= 0) & (slot < slots))[:, None]
        store_pairs(k_cache_ptr, (slot * kv_heads + head - heads) * 2 * half, j, half, a, b, fits)


@triton.jit
def normed_pairs(
    apart_ptr, norm_ptr, begins, j, inverse, mask, half, HEAD_NORM: tl.constexpr
):  # fmt: skip
    """Channels j and half + j of the heads that begin there, normalised and rounded, in fp32."""
    at = begins[:, None] + j[None, :]
    a = tl.load(apart_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    b = tl.load(apart_ptr + at + half, mask=mask, other=0.0, cache_modifier=".cg")
    a_scale = tl.load(norm_ptr + j, mask=j < half, other=0.0).to(tl.float32)
    b_scale = tl.load(norm_ptr + half + j, mask=j < half, other=0.0).to(tl.float32)
    if HEAD_NORM == 2:
        a_scale, b_scale = a_scale + 1.0, b_scale + 1.0
    a = (a.to(tl.float32) * inverse[:, None] * a_scale[None, :]).to(a.dtype)
    b = (b.to(tl.float32) * inverse[:, None] * b_scale[None, :]).to(b.dtype)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def whole_heads(
    apart_ptr, q_norm_ptr, k_norm_ptr, begins, own, is_query, half, eps,
    HEAD_NORM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """All pairs of the heads that begin there, one a row, normalised: their numbers and both channels."""
    channel = tl.arange(0, 1 << SUMS)
    inside = own[:, None] & (channel < 2 * half)[None, :]
    x = tl.load(apart_ptr + begins[:, None] + channel[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tree_sum(x * x, SUMS) / (2 * half) + eps)
    j = tl.arange(0, 1 << (SUMS - 1))
    mask = own[:, None] & (j < half)[None, :]
    if is_query:
        a, b = normed_pairs(apart_ptr, q_norm_ptr, begins, j, inverse, mask, half, HEAD_NORM)
    else:
        a, b = normed_pairs(apart_ptr, k_norm_ptr, begins, j, inverse, mask, half, HEAD_NORM)
    return j, a, b


@triton.jit(do_not_specialize=["rows"])
def _linear_rope_append(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, norm_ptr, squares_ptr, eps, q_norm_ptr, k_norm_ptr, head_eps,
    apart_ptr, arrivals_ptr, position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    rows, features, x_stride, partition, max_position, slots, heads, kv_heads, half,
    HEAD_NORM: tl.constexpr, SUMS: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, LEVELS: tl.constexpr,
    PARTITIONS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """HEAD_NORM: the last program of a head of queries or keys normalises and turns the whole of it."""
    HALF: tl.constexpr = COLS // 2
    tiles = tl.cdiv(half, HALF)
    head, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * HALF
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    c = (head * 2 + c // HALF) * half + tl.minimum(first + c % HALF, half - 1)
    begin_product(weight_ptr, c, 0, tl.minimum(partition, features), features, PDL, COLS)
    sums = all_partitions(
        x_ptr, weight_ptr, norm_ptr, squares_ptr, r, c, rows, features, x_stride, partition, eps,
        PARTITIONS, NORM, LEVELS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    y = finished(sums, scales_ptr, bias_ptr, c, HAS_SCALES, HAS_BIAS)
    # Rounded as between two ops.
    a, b = split_pairs(y.to(x_ptr.dtype.element_ty).to(tl.float32), ROWS, COLS)
    j = first + tl.arange(0, HALF)
    mask = (r < rows)[:, None] & (j < half)[None, :]
    if head >= heads + kv_heads:
        slot = tl.load(slot_ptr + r, mask=r < rows, other=-1)
        row = (slot * kv_heads + head - heads - kv_heads) * 2 * half
        store_pairs(v_cache_ptr, row, j, half, a, b, mask & ((slot >= 0) & (slot < slots))[:, None])
    elif HEAD_NORM > 0:
        begins = (r.to(tl.int64) * (heads + kv_heads) + head) * 2 * half
        store_pairs(apart_ptr, begins, j, half, a, b, mask)
        if arrives_last(arrivals_ptr + head, tiles):
            every, whole_a, whole_b = whole_heads(
                apart_ptr, q_norm_ptr, k_norm_ptr, begins, r < rows, head < heads, half, head_eps,
                HEAD_NORM, SUMS,
            )  # fmt: skip
            turn(
                whole_a, whole_b, r, every, head, position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr,
                slot_ptr, rows, max_position, slots, heads, kv_heads, half,
            )  # fmt: skip
    else:
        turn(
            a, b, r, j, head, position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, slot_ptr,
            rows, max_position, slots, heads, kv_heads, half,
        )  # fmt: skip


class Heads(NamedTuple):
    """The norm of each head as the kernel takes it: kind 0 for none, 1, or 2 with a unit offset."""

    q: Tensor
    k: Tensor
    eps: float
    apart: Tensor
    arrivals: Tensor
    kind: int
    levels: int

    @classmethod
    def of(
        cls, op: str, norm: HeadNorm | None, arrivals: Tensor | None, x: Tensor, heads: int, head_dim: int
    ) -> "Heads":
        """`heads`: those of queries and of keys."""
        if norm is None or arrivals is None:
            return cls(x, x, 0.0, x, x, 0, 1)
        q = require(op, "head_norm.q", norm.q, (head_dim,), x.dtype, x.device)
        k = require(op, "head_norm.k", norm.k, (head_dim,), x.dtype, x.device)
        apart = x.new_empty(x.shape[0], heads, head_dim)
        counts = check_arrivals(op, arrivals, x)
        kind = 2 if norm.unit_offset else 1
        return cls(q, k, norm.eps, apart, counts, kind, (head_dim - 1).bit_length())


def is_fused(rows: int, heads: int, head_dim: int, norm: HeadNorm | None, arrivals: Tensor | None) -> bool:
    """Whether the product normalises its heads, if they are: where its programs can be counted by heads of
    queries and keys, and a head is normalised by itself.
    """
    if norm is None:
        return True
    return arrivals is not None and rows <= FEW_ROWS and len(norm.q) == head_dim and heads <= ARRIVALS


def linear_rope_append(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norm: Norm | None = None,
    head_norm: HeadNorm | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    op = "linear_rope_append"
    source = Source.of(op, x, weight, bias, norm)
    (rows, features), cols = x.shape, source.weight.shape[0]
    blocks, block_size, kv_heads, head_dim = sizes(op, "k_cache", k_cache, 4)
    max_position, half = sizes(op, "cos", cos, 2)
    heads = split_heads(x.new_empty(0, cols), k_cache)[0].shape[1]
    config, inputs = config_of(x.device), partition(features, cols)
    tile, counted = config.tile(x.dtype, source.weight.dtype, rows, cols), heads + kv_heads
    is_split = features > inputs and rows <= tile.rows
    if 2 * half != head_dim or is_split or not is_fused(rows, counted, head_dim, head_norm, arrivals):
        apart = split_heads(linear(source.x, weight, bias, norm=norm if source.kind else None), k_cache)
        return rope_append(*apart, positions, cos, sin, k_cache, v_cache, slot_mapping, head_norm)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(op, name, cache, (blocks, block_size, kv_heads, head_dim), x)
    positions = require(op, "positions", positions, (rows,), torch.int64, x.device)
    slot_mapping = require(op, "slot_mapping", slot_mapping, (rows,), torch.int64, x.device)
    cos = require(op, "cos", cos, (max_position, half), torch.float32, x.device)
    sin = require(op, "sin", sin, (max_position, half), torch.float32, x.device)
    by_head = Heads.of(op, head_norm, arrivals, x, counted, head_dim)
    out = x.new_empty(rows, heads, head_dim)
    grid = ((counted + kv_heads) * triton.cdiv(half, tile.cols // 2), triton.cdiv(rows, tile.rows))
    _linear_rope_append[grid](
        *source[:7], *by_head[:5], positions, cos, sin, out, k_cache, v_cache, slot_mapping,
        rows, features, source.x.stride(0), inputs, max_position, blocks * block_size, heads, kv_heads, half,
        *by_head[5:], *source[7:], triton.cdiv(features, inputs) if inputs else 0,
        config.pdl, *tile[:3], **config.options(SHARES.value, tile.stages),
    )  # fmt: skip
    return out
