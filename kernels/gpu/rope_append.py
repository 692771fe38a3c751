"""Rotary embedding with the append to the paged cache on a GPU: a program per row and head of q, k or v.

A position outside the tables gives NaN and a slot outside the cache is not written: to refuse them would take
waiting for the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import inverse_root
from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.row import Row
from nudging.kernels.gpu.kv_append import check_cache, dense_rows
from nudging.kernels.gpu.rope import Parts, copy_rest, rotate_head
from nudging.kernels.rope_append import HeadNorm


@triton.jit
def inverse_of(from_ptr, row_ptr, head_dim, heads, eps, WHOLE: tl.constexpr, SPAN: tl.constexpr):
    """What the norm multiplies a head by: that of its own channels, or of the WHOLE row's."""
    at = tl.arange(0, SPAN)
    span, begin_ptr = head_dim, from_ptr
    if WHOLE:
        span, begin_ptr = head_dim * heads, row_ptr
    return inverse_root(tl.load(begin_ptr + at, mask=at < span, other=0.0).to(tl.float32), span, eps, SPAN)


@triton.jit
def _rope_append(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, eps,
    position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    q_stride, k_stride, v_stride, max_position, slots, heads, kv_heads, head_dim, half,
    PDL: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr, Q_SPAN: tl.constexpr, K_SPAN: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(position_ptr + row), tl.load(slot_ptr + row)
    fits = (slot >= 0) & (slot < slots)
    inverse = 1.0
    if head < heads:
        row_ptr = q_ptr + row * q_stride
        from_ptr = row_ptr + head * head_dim
        to_ptr = out_ptr + (row * heads + head) * head_dim
        if NORM > 0:
            inverse = inverse_of(from_ptr, row_ptr, head_dim, heads, eps, WHOLE, Q_SPAN)
        norm_ptr = q_norm_ptr + head * head_dim if WHOLE else q_norm_ptr
        rotate_head(
            from_ptr, to_ptr, norm_ptr, inverse, position, cos_ptr, sin_ptr, max_position, head_dim, half,
            row >= 0, NORM, HALF, REST,
        )  # fmt: skip
    elif head < heads + kv_heads:
        row_ptr = k_ptr + row * k_stride
        from_ptr = row_ptr + (head - heads) * head_dim
        to_ptr = k_cache_ptr + (slot * kv_heads + head - heads) * head_dim
        if NORM > 0:
            inverse = inverse_of(from_ptr, row_ptr, head_dim, kv_heads, eps, WHOLE, K_SPAN)
        norm_ptr = k_norm_ptr + (head - heads) * head_dim if WHOLE else k_norm_ptr
        rotate_head(
            from_ptr, to_ptr, norm_ptr, inverse, position, cos_ptr, sin_ptr, max_position, head_dim, half,
            fits, NORM, HALF, REST,
        )  # fmt: skip
    else:
        from_ptr = v_ptr + row * v_stride + (head - heads - kv_heads) * head_dim
        to_ptr = v_cache_ptr + (slot * kv_heads + head - heads - kv_heads) * head_dim
        copy_rest(from_ptr, to_ptr, v_ptr, 1.0, 0, head_dim, fits, 0, HEAD)


class Norms(NamedTuple):
    """The norm of queries and keys as the kernel takes it: kind 0 for none, 1, or 2 with a unit offset."""

    q: Tensor
    k: Tensor
    eps: float
    kind: int
    whole: bool
    q_span: int
    k_span: int
    warps: int

    @classmethod
    def of(cls, op: str, norm: HeadNorm | None, q: Tensor, k: Tensor) -> "Norms":
        if norm is None:
            return cls(q, k, 0.0, 0, False, 1, 1, 1)
        head_dim, whole = q.shape[2], len(norm.q) != q.shape[2]
        spans = [x.shape[1] * head_dim if whole else head_dim for x in (q, k)]
        q_weight = require(op, "head_norm.q", norm.q, (spans[0],), q.dtype, q.device)
        k_weight = require(op, "head_norm.k", norm.k, (spans[1],), q.dtype, q.device)
        blocks = [Row.of(op, span) for span in spans]
        return cls(
            q_weight, k_weight, norm.eps, 2 if norm.unit_offset else 1, whole,
            blocks[0].block, blocks[1].block, blocks[0].warps,
        )  # fmt: skip


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    head_norm: HeadNorm | None = None,
) -> Tensor:
    op = "rope_append"
    rows, heads, head_dim = sizes(op, "q", q, 3)
    blocks, block_size, kv_heads, _ = sizes(op, "k_cache", k_cache, 4)
    max_position, half = sizes(op, "cos", cos, 2)
    q = dense_rows(op, "q", q, (rows, heads, head_dim), q)
    k = dense_rows(op, "k", k, (rows, kv_heads, head_dim), q)
    v = dense_rows(op, "v", v, (rows, kv_heads, head_dim), q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(op, name, cache, (blocks, block_size, kv_heads, head_dim), q)
    positions = require(op, "positions", positions, (rows,), torch.int64, q.device)
    slot_mapping = require(op, "slot_mapping", slot_mapping, (rows,), torch.int64, q.device)
    cos = require(op, "cos", cos, (max_position, half), torch.float32, q.device)
    sin = require(op, "sin", sin, (max_position, half), torch.float32, q.device)
    parts, norms = Parts.of(op, head_dim, half), Norms.of(op, head_norm, q, k)
    blocks_of = (parts.half, parts.rest, triton.next_power_of_2(head_dim))
    out, config = q.new_empty(rows, heads, head_dim), config_of(q.device)
    _rope_append[(rows, heads + 2 * kv_heads)](
        q, k, v, *norms[:3], positions, cos, sin, out, k_cache, v_cache, slot_mapping,
        q.stride(0), k.stride(0), v.stride(0), max_position, blocks * block_size,
        heads, kv_heads, head_dim, half, config.pdl, *norms[3:7], *blocks_of,
        **config.options(norms.warps),
    )  # fmt: skip
    return out
