"""Write new keys and values into their slots of the paged cache."""

from torch import Tensor

from .op import Op


@Op
def kv_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot // block_size, slot % block_size] = row, in place.

    k, v: [rows, kv_heads, head_dim]; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim] of the same
    dtype, contiguous; slot_mapping: [rows] int64, each slot at most once.
    """
    k_cache.flatten(0, 1)[slot_mapping] = k
    v_cache.flatten(0, 1)[slot_mapping] = v
