"""Rotary position embedding of queries and keys, the keys and values going straight into the paged cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .cuda import on_cuda
from .kv_append import kv_append
from .op import Op
from .rms_norm import rms_norm
from .rope import rope


class HeadNorm(NamedTuple):
    """The rms_norm of queries and of keys, before they are turned.

    q, k: weights [head_dim], for every head by itself, or [heads * head_dim], for all heads at once.
    """

    q: Tensor
    k: Tensor
    eps: float
    unit_offset: bool = False

    def apply(self, norm: Callable[..., Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both [rows, heads, head_dim], normalised by `norm`, which is rms_norm or its reference."""
        rest = self.eps, self.unit_offset
        return (
            norm(q.reshape(len(q), -1, len(self.q)), self.q, *rest).view_as(q),
            norm(k.reshape(len(k), -1, len(self.k)), self.k, *rest).view_as(k),
        )


@Op
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
    """rope(q); rope(k) and v are written into the cache, in place; q and k are normalised first if asked for.

    q: [rows, heads, head_dim]; k, v: [rows, kv_heads, head_dim] of q's dtype; positions, cos, sin: as in
    rope; k_cache, v_cache, slot_mapping: as in kv_append.
    """
    if head_norm is not None:
        q, k = head_norm.apply(rms_norm.reference, q, k)
    kv_append.reference(rope.reference(k, positions, cos, sin), v, k_cache, v_cache, slot_mapping)
    return rope.reference(q, positions, cos, sin)


@rope_append.impl("cpu", runs_on=lambda q, *_, **__: on_cpu(q))
def _rope_append_cpu(
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
    isa: _C.Isa = BEST,
) -> Tensor:
    op, dtype = "rope_append", q.dtype
    if head_norm is not None:
        q, k = head_norm.apply(rms_norm, q, k)
    rows, heads, head_dim = sizes(op, "q", q, 3)
    blocks, block_size, kv_heads, _ = sizes(op, "k_cache", k_cache, 4)
    max_position, half = sizes(op, "cos", cos, 2)
    q = _dense_rows(op, "q", q, (rows, heads, head_dim), dtype)
    k = _dense_rows(op, "k", k, (rows, kv_heads, head_dim), dtype)
    v = _dense_rows(op, "v", v, (rows, kv_heads, head_dim), dtype)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if require(op, name, cache, (blocks, block_size, kv_heads, head_dim), dtype) is not cache:
            raise ValueError(f"{op}: {name} is not contiguous, its strides are {cache.stride()}")
    positions = require(op, "positions", positions, (rows,), torch.int64)
    slot_mapping = require(op, "slot_mapping", slot_mapping, (rows,), torch.int64)
    cos = require(op, "cos", cos, (max_position, half), torch.float32)
    sin = require(op, "sin", sin, (max_position, half), torch.float32)
    out = q.new_empty(rows, heads, head_dim)
    _C.rope_append(
        isa,
        team(),
        DTYPES[dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        half,
        max_position,
        blocks * block_size,
    )
    return out


def _dense_rows(op: str, name: str, x: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """`x`, each row of it dense, wherever the rows lie; ValueError as in `require`."""
    if x.stride()[1:] != (shape[2], 1) or x.shape != shape or x.dtype != dtype or not x.is_cpu:
        return require(op, name, x, shape, dtype)
    return x


rope_append.impl_at(
    "triton",
    runs_on=lambda q, *_, **__: on_cuda(q),
    at="nudging.kernels.gpu.rope_append:rope_append",
)
