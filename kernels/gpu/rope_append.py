"""Rotary embedding with the append to the paged cache on a GPU: a program per row and head of q, k or v.

A position outside the tables gives NaN and a slot outside the cache is not written: to refuse them would take
waiting for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..check import require, sizes
from .kv_append import check_cache, dense_rows
from .rope import Parts, copy_rest, rotate_head


@triton.jit
def _rope_append(
    q_ptr, k_ptr, v_ptr, position_ptr, cos_ptr, sin_ptr, out_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    q_stride, k_stride, v_stride, max_position, slots, heads, kv_heads, head_dim, half,
    HALF: tl.constexpr, REST: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(position_ptr + row), tl.load(slot_ptr + row)
    fits = (slot >= 0) & (slot < slots)
    if head < heads:
        from_ptr = q_ptr + row * q_stride + head * head_dim
        to_ptr = out_ptr + (row * heads + head) * head_dim
        rotate_head(
            from_ptr, to_ptr, position, cos_ptr, sin_ptr, max_position, head_dim, half, row >= 0, HALF, REST
        )
    elif head < heads + kv_heads:
        from_ptr = k_ptr + row * k_stride + (head - heads) * head_dim
        to_ptr = k_cache_ptr + (slot * kv_heads + head - heads) * head_dim
        rotate_head(
            from_ptr, to_ptr, position, cos_ptr, sin_ptr, max_position, head_dim, half, fits, HALF, REST
        )
    else:
        from_ptr = v_ptr + row * v_stride + (head - heads - kv_heads) * head_dim
        to_ptr = v_cache_ptr + (slot * kv_heads + head - heads - kv_heads) * head_dim
        copy_rest(from_ptr, to_ptr, 0, head_dim, fits, HEAD)


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
    parts = Parts.of(op, head_dim, half)
    out = q.new_empty(rows, heads, head_dim)
    _rope_append[(rows, heads + 2 * kv_heads)](
        q, k, v, positions, cos, sin, out, k_cache, v_cache, slot_mapping,
        q.stride(0), k.stride(0), v.stride(0), max_position, blocks * block_size,
        heads, kv_heads, head_dim, half, parts.half, parts.rest, triton.next_power_of_2(head_dim),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out
