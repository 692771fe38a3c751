"""QKV projection, RoPE and cache append on a GPU: a program computes pairs of channels of one head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..check import require, sizes
from ..linear_rope_append import split_heads
from ..rms_norm import Norm
from ..weight import Weight
from .configs import config_of
from .kv_append import check_cache
from .linear import linear
from .pdl import begin
from .rope import rotated
from .rope_append import rope_append
from .source import Source
from .tile import all_partitions, finished, partition, split_pairs


@triton.jit
def store_pairs(to_ptr, row, j, half, a, b, mask):
    """Channels j and half + j of the heads that begin at `row`."""
    at = row[:, None] + j[None, :]
    tl.store(to_ptr + at, a.to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + at + half, b.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _linear_rope_append(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, norm_ptr, squares_ptr, eps,
    position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    rows, features, x_stride, partition, max_position, slots, heads, kv_heads, half,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, LEVELS: tl.constexpr,
    PARTITIONS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    HALF: tl.constexpr = COLS // 2
    tiles = tl.cdiv(half, HALF)
    head, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * HALF
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    c = (head * 2 + c // HALF) * half + tl.minimum(first + c % HALF, half - 1)
    sums = all_partitions(
        x_ptr, weight_ptr, norm_ptr, squares_ptr, r, c, rows, features, x_stride, partition, eps,
        PARTITIONS, NORM, LEVELS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    y = finished(sums, scales_ptr, bias_ptr, c, HAS_SCALES, HAS_BIAS)
    # Rounded as between two ops.
    a, b = split_pairs(y.to(x_ptr.dtype.element_ty).to(tl.float32), ROWS, COLS)
    j = first + tl.arange(0, HALF)
    mask = (r < rows)[:, None] & (j < half)[None, :]
    slot = tl.load(slot_ptr + r, mask=r < rows, other=-1)
    fits = mask & ((slot >= 0) & (slot < slots))[:, None]
    if head < heads + kv_heads:
        position = tl.load(position_ptr + r, mask=r < rows, other=-1)
        known = mask & ((position >= 0) & (position < max_position))[:, None]
        angle = position[:, None] * half + j[None, :]
        cosine = tl.load(cos_ptr + angle, mask=known, other=float("nan"))
        sine = tl.load(sin_ptr + angle, mask=known, other=float("nan"))
        a, b = rotated(a, b, cosine, sine)
        if head < heads:
            store_pairs(out_ptr, (r.to(tl.int64) * heads + head) * 2 * half, j, half, a, b, mask)
        else:
            store_pairs(k_cache_ptr, (slot * kv_heads + head - heads) * 2 * half, j, half, a, b, fits)
    else:
        row = (slot * kv_heads + head - heads - kv_heads) * 2 * half
        store_pairs(v_cache_ptr, row, j, half, a, b, fits)


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
) -> Tensor:
    op = "linear_rope_append"
    source = Source.of(op, x, weight, bias, norm)
    (rows, features), cols = x.shape, source.weight.shape[0]
    blocks, block_size, kv_heads, head_dim = sizes(op, "k_cache", k_cache, 4)
    max_position, half = sizes(op, "cos", cos, 2)
    config, inputs = config_of(x.device), partition(features, cols)
    tile = config.tile(x.dtype, rows, cols)
    if 2 * half != head_dim or (features > inputs and rows <= tile.rows):
        apart = split_heads(linear(source.x, weight, bias, norm=norm if source.kind else None), k_cache)
        return rope_append(*apart, positions, cos, sin, k_cache, v_cache, slot_mapping)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(op, name, cache, (blocks, block_size, kv_heads, head_dim), x)
    positions = require(op, "positions", positions, (rows,), torch.int64, x.device)
    slot_mapping = require(op, "slot_mapping", slot_mapping, (rows,), torch.int64, x.device)
    cos = require(op, "cos", cos, (max_position, half), torch.float32, x.device)
    sin = require(op, "sin", sin, (max_position, half), torch.float32, x.device)
    heads = split_heads(x.new_empty(0, cols), k_cache)[0].shape[1]
    out = x.new_empty(rows, heads, head_dim)
    grid = ((heads + 2 * kv_heads) * triton.cdiv(half, tile.cols // 2), triton.cdiv(rows, tile.rows))
    _linear_rope_append[grid](
        *source[:7], positions, cos, sin, out, k_cache, v_cache, slot_mapping,
        rows, features, source.x.stride(0), inputs, max_position, blocks * block_size, heads, kv_heads, half,
        *source[7:], triton.cdiv(features, inputs) if inputs else 0,
        config.pdl, *tile[:3], **config.options(tile.warps, tile.stages),
    )  # fmt: skip
    return out
