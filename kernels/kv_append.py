"""Write new keys and values into their slots of the paged cache."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import on_cpu, require, sizes, team
from .cuda import on_cuda
from .op import Op


@Op
def kv_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot // block_size, slot % block_size] = row, in place.

    k, v: [rows, kv_heads, head_dim]; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim] of the same
    dtype, contiguous; slot_mapping: [rows] int64, each slot at most once.
    """
    k_cache.flatten(0, 1)[slot_mapping] = k
    v_cache.flatten(0, 1)[slot_mapping] = v


@kv_append.impl("cpu", runs_on=lambda k, v, k_cache, v_cache, slot_mapping: on_cpu(k))
def _kv_append_cpu(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    rows, kv_heads, head_dim = sizes("kv_append", "k", k, 3)
    blocks, block_size = sizes("kv_append", "k_cache", k_cache, 4)[:2]
    cache_shape = (blocks, block_size, kv_heads, head_dim)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if require("kv_append", name, cache, cache_shape, k.dtype) is not cache:
            raise ValueError(f"kv_append: {name} is not contiguous, its strides are {cache.stride()}")
    k = k.contiguous()
    v = require("kv_append", "v", v, (rows, kv_heads, head_dim), k.dtype)
    slot_mapping = require("kv_append", "slot_mapping", slot_mapping, (rows,), torch.int64)
    _C.kv_append(
        team(),
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        rows,
        kv_heads * head_dim * k.element_size(),
        blocks * block_size,
    )


kv_append.impl_at(
    "triton",
    runs_on=lambda k, v, k_cache, v_cache, slot_mapping: on_cuda(k),
    at="nudging.kernels.gpu.kv_append:kv_append",
)
