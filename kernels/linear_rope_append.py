"""The projection to queries, keys and values, with what becomes of them before attention."""

from torch import Tensor

from .cpu import on_cpu
from .cuda import on_cuda
from .linear import linear, product
from .op import Op
from .rms_norm import Norm
from .rope_append import HeadNorm, rope_append
from .weight import Weight


def split_heads(qkv: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [rows, heads, head_dim] of a projection; ValueError if they do not fit."""
    kv_heads, head_dim = k_cache.shape[2:]
    heads, rest = divmod(qkv.shape[1], head_dim)
    if rest or heads <= 2 * kv_heads:
        raise ValueError(
            f"linear_rope_append: {qkv.shape[1]} columns do not split into queries, "
            f"{kv_heads} keys and {kv_heads} values of {head_dim} channels"
        )
    every = qkv.view(-1, heads, head_dim)
    q, k, v = every.split_with_sizes((heads - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    return q, k, v


@Op
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
    """rope_append of linear(x, weight, bias, norm=norm), with the bits of the two ops.

    Gives back the queries [rows, heads, head_dim].  x: [rows, in]; weight: [(heads + 2 * kv_heads) *
    head_dim, in], queries first, then keys, then values; bias: its columns or None; norm: as in linear; the
    others as in rope_append.  `arrivals`: see cuda.py.
    """
    heads = split_heads(product(x, weight, bias, norm).to(x.dtype), k_cache)
    return rope_append.reference(*heads, positions, cos, sin, k_cache, v_cache, slot_mapping, head_norm)


@linear_rope_append.impl("cpu", runs_on=lambda x, *_, **__: on_cpu(x))
def _linear_rope_append_cpu(
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
    heads = split_heads(linear(x, weight, bias, norm=norm), k_cache)
    return rope_append(*heads, positions, cos, sin, k_cache, v_cache, slot_mapping, head_norm)


linear_rope_append.impl_at(
    "triton",
    runs_on=lambda x, *_, **__: on_cuda(x),
    at="nudging.kernels.gpu.linear_rope_append:linear_rope_append",
)
