"""New keys and values into the paged cache on a GPU: a program per row.

A slot outside the cache is not written: to refuse it would take waiting for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes


@triton.jit
def _kv_append(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, slots, k_stride, v_stride, size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_ptr + row)
    write = (at < size) & (slot >= 0) & (slot < slots)
    tl.store(k_cache_ptr + slot * size + at, tl.load(k_ptr + row * k_stride + at, mask=write), mask=write)
    tl.store(v_cache_ptr + slot * size + at, tl.load(v_ptr + row * v_stride + at, mask=write), mask=write)


def dense_rows(op: str, name: str, x: Tensor, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """`x`, each row of it dense, wherever the rows lie; ValueError as in `require`."""
    if (
        x.stride()[1:] != (shape[2], 1)
        or x.shape != shape
        or x.dtype != like.dtype
        or x.device != like.device
    ):
        return require(op, name, x, shape, like.dtype, like.device)
    return x


def check_cache(op: str, name: str, cache: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """ValueError unless the cache can be written in place."""
    if require(op, name, cache, shape, like.dtype, like.device) is not cache:
        raise ValueError(f"{op}: {name} is not contiguous, its strides are {cache.stride()}")


def kv_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    op = "kv_append"
    rows, kv_heads, head_dim = sizes(op, "k", k, 3)
    blocks, block_size = sizes(op, "k_cache", k_cache, 4)[:2]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(op, name, cache, (blocks, block_size, kv_heads, head_dim), k)
    k = dense_rows(op, "k", k, (rows, kv_heads, head_dim), k)
    v = dense_rows(op, "v", v, (rows, kv_heads, head_dim), k)
    slot_mapping = require(op, "slot_mapping", slot_mapping, (rows,), torch.int64, k.device)
    size = kv_heads * head_dim
    block = min(triton.next_power_of_2(size), 1024)
    _kv_append[(rows, triton.cdiv(size, block))](
        k, v, k_cache, v_cache, slot_mapping, blocks * block_size, k.stride(0), v.stride(0), size,
        block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
