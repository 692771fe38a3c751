"""One table of cases for all ops: correctness tests, the Triton interpreter and benchmarks read it.

A case makes its arguments from a seed and a dtype.  Memory that an op must not look at is poisoned: NaN in
unused slots of the key-value cache, impossible ids in unused entries of block tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nudging.kernels.op import Op
from nudging.kernels.rms_norm import Norm
from nudging.kernels.rope_append import HeadNorm
from nudging.kernels.weight import Int8Weight, quantize_int8

Args = tuple[Any, ...]
Make = Callable[[int, torch.dtype], Args]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call of the op in kernels/`op`.py.

    `ulps`: how far a result may be from the fp64 reference, in fp32 units in the last place of its magnitude,
    before it is rounded to its own dtype; `reason` says why so many.  `magnitude(args, want)` is what errors
    are relative to, by default the row's largest element.
    """

    op: str
    name: str
    make: Make
    ulps: float
    reason: str
    magnitude: Callable[[Args, Tensor], Tensor] | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def load(op: str) -> Op[..., Any]:
    """The op of that name."""
    found: Op[..., Any] = getattr(importlib.import_module(f"nudging.kernels.{op}"), op)
    return found


class _Fp64(TorchFunctionMode):
    """Makes the references' own casts to fp32 casts to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **(kwargs or {}))


def exact(op: Op[..., Any], *args: Any) -> Any:
    """What the reference gives when all of it runs in fp64, inputs and outputs too."""

    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x

    with _Fp64():
        return op.reference(*tree_map(widen, args))


def noise(seed: int) -> Callable[..., Tensor]:
    """randn(*shape, dtype) from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)


# linear


def linear_args(
    rows: int, features: int, cols: int, bias: bool = False, out: Any = None, int8: bool = False
) -> Make:
    def make(seed: int, dtype: torch.dtype) -> Args:
        randn = noise(seed)
        x, weight = randn(rows, features, dtype=dtype), randn(cols, features, dtype=dtype)
        read = quantize_int8(weight) if int8 else weight
        return x, read, randn(cols, dtype=dtype) if bias else None, out

    return make


def _strided_linear(seed: int, dtype: torch.dtype) -> Args:
    randn = noise(seed)
    return randn(7, 66, dtype=dtype)[:, ::2], randn(33, 19, dtype=dtype).T, None, None


def sum_of_sizes(args: Args, want: Tensor) -> Tensor:
    x, weight, bias, _ = args
    values, scales = weight if isinstance(weight, Int8Weight) else (weight, torch.ones(len(weight)))
    sizes: Tensor = (x.double().abs() @ values.double().abs().T) * scales.double()
    return sizes if bias is None else sizes + bias.double().abs()


def _linear(name: str, make: Make) -> Case:
    reason = "a lane adds its products one by one; errors of random sign leave few ulps of sum |x w|"
    return Case("linear", name, make, 4, reason, sum_of_sizes)


LINEAR = [
    *(
        _linear(f"{rows}x{features}x{cols}", linear_args(rows, features, cols))
        for rows, features, cols in [
            (1, 1, 1),
            (1, 64, 7),
            (7, 33, 5),
            (3, 1025, 33),
            (16, 48, 129),
            (33, 7, 1025),
        ]
    ),
    _linear("bias", linear_args(5, 100, 33, bias=True)),
    _linear("fp32-out", linear_args(5, 64, 33, bias=True, out=torch.float32)),
    _linear("partitions", linear_args(3, 4100, 20, bias=True)),
    _linear("no-rows", linear_args(0, 64, 33)),
    *(
        _linear(f"int8-{rows}x{features}x{cols}", linear_args(rows, features, cols, bias=True, int8=True))
        for rows, features, cols in [(1, 1, 1), (7, 33, 5), (3, 1025, 33), (16, 48, 129), (0, 64, 3)]
    ),
    _linear("int8-fp32-out", linear_args(5, 64, 33, out=torch.float32, int8=True)),
    _linear("int8-partitions", linear_args(3, 4100, 20, bias=True, int8=True)),
    _linear("strided", _strided_linear),
]

# Norms


def norm_args(*shape: int, unit_offset: bool = False) -> Make:
    def make(seed: int, dtype: torch.dtype) -> Args:
        randn = noise(seed)
        return randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype), 1e-6, unit_offset

    return make


def _strided_norm(seed: int, dtype: torch.dtype) -> Args:
    fused = noise(seed)(5, 6, 40, dtype=dtype)
    return fused[:, 2:4], noise(seed + 1)(40, dtype=dtype), 1e-5, False


def _no_weight(make: Make) -> Make:
    return lambda seed, dtype: (make(seed, dtype)[0] + 3, 1e-5)


_NORM = "a sum of squares by lanes, a square root, a division and two products"
NORMS = [
    *(
        Case("rms_norm", "x".join(map(str, shape)), norm_args(*shape), 4, _NORM)
        for shape in [(1, 1), (7, 33), (3, 1025), (5, 3, 40), (0, 64)]
    ),
    Case("rms_norm", "unit-offset", norm_args(5, 77, unit_offset=True), 4, _NORM),
    Case("rms_norm", "strided", _strided_norm, 4, _NORM),
    *(
        Case(
            "layer_norm",
            f"{rows}x{dim}",
            _no_weight(norm_args(rows, dim)),
            12,
            _NORM + " of what is left of the mean 3",
        )
        for rows, dim in [(7, 33), (3, 1025), (0, 64)]
    ),
]

# The residual sum with its norm


def _plain_rows(seed: int, rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Norm]:
    """Rows of powers of two, alike but for their signs, and a norm of such: exact in every dtype."""
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rows, dim), generator=draw) * 2 - 1
    sizes = torch.exp2(torch.randint(-2, 3, (rows, 1), generator=draw))
    weight = torch.exp2(torch.randint(-1, 2, (dim,), generator=draw))
    return (signs * sizes).to(dtype), Norm(weight.to(dtype), 0.0)


def add_norm_args(rows: int, dim: int, unit_offset: bool = False) -> Make:
    """Sums of eighths, which every dtype holds: the op rounds the sum, its reference in fp64 does not."""

    def make(seed: int, dtype: torch.dtype) -> Args:
        randn = noise(seed)
        x, y = ((randn(rows, dim) * 8).round().clamp(-64, 64).div(8).to(dtype) for _ in range(2))
        return x, y, randn(dim, dtype=dtype), 1e-6, unit_offset

    return make


def _sum_of_a_norm(normed: bool) -> Make:
    """y is normalised to what every dtype holds."""

    def make(seed: int, dtype: torch.dtype) -> Args:
        x, _, weight, *_ = add_norm_args(5, 64)(seed, dtype)
        y, norm = _plain_rows(seed, 5, 64, dtype)
        return x, y, weight if normed else None, norm.eps, False, norm.weight

    return make


NORMS += [
    *(
        Case("add_rms_norm", f"{rows}x{dim}", add_norm_args(rows, dim), 4, _NORM)
        for rows, dim in [(1, 1), (7, 33), (3, 1025), (0, 64)]
    ),
    Case("add_rms_norm", "unit-offset", add_norm_args(5, 77, unit_offset=True), 4, _NORM),
    Case("add_rms_norm", "of-a-norm", _sum_of_a_norm(True), 4, _NORM),
    Case("add_rms_norm", "of-a-norm-alone", _sum_of_a_norm(False), 4, _NORM),
]

# rope


def rope_args(rows: int, heads: int, head_dim: int, half: int) -> Make:
    def make(seed: int, dtype: torch.dtype) -> Args:
        angles = torch.arange(99)[:, None] * torch.logspace(0, -3, half)[None]
        positions = torch.randint(0, 99, (rows,), generator=torch.Generator().manual_seed(seed))
        return noise(seed)(rows, heads, head_dim, dtype=dtype), positions, angles.cos(), angles.sin()

    return make


def _strided_rope(seed: int, dtype: torch.dtype) -> Args:
    x, *rest = rope_args(5, 9, 16, 8)(seed, dtype)
    return x[:, 3:6], *rest


_ROPE = "two products and a sum; cancellation is relative to the row's largest channel"
ROPE = [
    Case("rope", "llama", rope_args(7, 3, 64, 32), 2, _ROPE),
    Case("rope", "odd-half", rope_args(1, 2, 14, 7), 2, _ROPE),
    Case("rope", "partial", rope_args(33, 1, 80, 20), 2, _ROPE),
    Case("rope", "no-rows", rope_args(0, 2, 16, 8), 2, _ROPE),
    Case("rope", "strided", _strided_rope, 2, _ROPE),
]

# Activations and caps


def gated_act_args(rows: int, dim: int, activation: str, scale: float = 3.0) -> Make:
    return lambda seed, dtype: ((noise(seed)(rows, 2 * dim) * scale).to(dtype), activation)


def soft_cap_args(rows: int, vocab: int, cap: float, scale: float) -> Make:
    return lambda seed, dtype: ((noise(seed)(rows, vocab) * scale).to(dtype), cap)


_ACT = "an exponential to 2 ulps, a division and two products, relative to the row's largest element"
_CAP = "a polynomial to 2 ulps, a division and a product"
ELEMENTWISE = [
    *(
        Case("gated_act", f"{activation}-{rows}x{dim}", gated_act_args(rows, dim, activation), 6, _ACT)
        for activation in ("silu", "gelu", "gelu_tanh")
        for rows, dim in [(1, 1), (7, 33), (3, 1025), (0, 8)]
    ),
    *(
        Case("gated_act", f"{activation}-far", gated_act_args(2, 99, activation, 40.0), 6, _ACT)
        for activation in ("silu", "gelu", "gelu_tanh")
    ),
    Case("soft_cap", "gemma", soft_cap_args(3, 1025, 30.0, 20.0), 3, _CAP),
    Case("soft_cap", "small", soft_cap_args(7, 33, 50.0, 0.01), 3, _CAP),
    Case("soft_cap", "far", soft_cap_args(1, 7, 5.0, 1000.0), 3, _CAP),
]

# The paged cache


def kv_append_args(rows: int, kv_heads: int, head_dim: int) -> Make:
    def make(seed: int, dtype: torch.dtype) -> Args:
        randn = noise(seed)
        k_cache, v_cache = (randn(9, 4, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        slots = torch.randperm(36, generator=torch.Generator().manual_seed(seed))[:rows]
        fused = randn(rows, 3 * kv_heads, head_dim, dtype=dtype)
        return fused[:, kv_heads : 2 * kv_heads], fused[:, 2 * kv_heads :], k_cache, v_cache, slots

    return make


def rope_append_args(rows: int, heads: int, kv_heads: int, head_dim: int, half: int) -> Make:
    """Queries, keys and values as slices of one projection; a cache of four slots more than rows."""

    def make(seed: int, dtype: torch.dtype) -> Args:
        fused, *rest = rope_args(rows, heads + 2 * kv_heads, head_dim, half)(seed, dtype)
        q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
        caches = noise(seed + 1)(2, rows // 4 + 1, 4, kv_heads, head_dim, dtype=dtype)
        slots = torch.randperm(rows // 4 * 4 + 4, generator=torch.Generator().manual_seed(seed))[:rows]
        return q, k, v, *rest, caches[0], caches[1], slots

    return make


def head_norm_args(heads: int, kv_heads: int, head_dim: int, half: int, whole: bool) -> Make:
    """Queries and keys that are normalised to what every dtype holds, each head or the whole row."""

    def make(seed: int, dtype: torch.dtype) -> Args:
        q, k, *rest = rope_append_args(7, heads, kv_heads, head_dim, half)(seed, dtype)
        weights = []
        for i, x in enumerate((q, k)):
            plain, norm = _plain_rows(seed + i, 7, x.shape[1] * head_dim, dtype)
            x.copy_(plain.view_as(x))
            weights.append(norm.weight if whole else norm.weight[:head_dim])
        return q, k, *rest, HeadNorm(*weights, 0.0)

    return make


def page(
    keys: list[Tensor], values: list[Tensor], block_size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """k_cache, v_cache and block_tables that hold the sequences' keys and values.

    keys, values: [length, kv_heads, head_dim] per sequence.  Blocks are given out at random; what is not used
    of them is NaN, unused entries of the tables are impossible.
    """
    needed = [-(-len(k) // block_size) for k in keys]
    num_blocks = sum(needed) + 3
    caches = keys[0].new_full((2, num_blocks, block_size, *keys[0].shape[1:]), float("nan"))
    tables = torch.full((len(keys), max(needed) + 2), 2**31 - 1, dtype=torch.int32)
    tables[:, -1] = -1
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
    for s, count in enumerate(needed):
        tables[s, :count], free = free[:count], free[count:]
        at = torch.arange(len(keys[s]))
        slots = tables[s, at // block_size].long() * block_size + at % block_size
        caches[0].flatten(0, 1)[slots] = keys[s]
        caches[1].flatten(0, 1)[slots] = values[s]
    return caches[0], caches[1], tables


@dataclass(frozen=True)
class Attention:
    """A ragged batch: sequence s has `lengths[s]` tokens in the paged cache, `queries[s]` of them new."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0

    def __call__(self, seed: int, dtype: torch.dtype) -> Args:
        randn = noise(seed)
        keys, values = (
            [randn(length, self.kv_heads, self.head_dim, dtype=dtype) for length in self.lengths]
            for _ in range(2)
        )
        q = randn(sum(self.queries), self.heads, self.head_dim, dtype=dtype) * 2
        rows = torch.tensor([0, *self.queries]).cumsum(0).int()
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return q, *page(keys, values, self.block_size, seed), rows, lengths, 0.25, self.window, self.soft_cap


def largest_value(args: Args, want: Tensor) -> Tensor:
    values: Tensor = args[2].double().nan_to_num(0.0)
    return values.abs().max().expand_as(want)


def _attention(name: str, make: Attention) -> Case:
    reason = "logits near 10 wrong by an ulp or two make weights wrong by ten; relative to the largest value"
    return Case("paged_attention", name, make, 24, reason, largest_value)


CACHE = [
    Case("kv_append", "few", kv_append_args(5, 2, 16), 0, "copies"),
    Case("kv_append", "odd", kv_append_args(33, 1, 7), 0, "copies"),
    Case("kv_append", "no-rows", kv_append_args(0, 1, 7), 0, "copies"),
    Case("rope_append", "llama", rope_append_args(7, 4, 2, 64, 32), 2, _ROPE),
    Case("rope_append", "partial", rope_append_args(33, 2, 1, 80, 20), 2, _ROPE),
    Case("rope_append", "odd-half", rope_append_args(1, 1, 1, 14, 7), 2, _ROPE),
    Case("rope_append", "no-rows", rope_append_args(0, 2, 1, 16, 8), 2, _ROPE),
    Case("rope_append", "head-norm", head_norm_args(4, 2, 64, 32, whole=False), 2, _ROPE),
    Case("rope_append", "whole-norm", head_norm_args(4, 2, 64, 20, whole=True), 2, _ROPE),
    _attention("one-token", Attention((1,), (1,))),
    _attention("decode", Attention((1, 7, 33, 200), (1, 1, 1, 1))),
    _attention("prefill", Attention((33, 70), (33, 70))),
    _attention("mixed", Attention((40, 9, 150, 64), (3, 9, 0, 16))),
    _attention("no-rows", Attention((5,), (0,))),
    _attention("multi-query", Attention((70, 5), (2, 1), heads=7, kv_heads=1)),
    _attention("multi-head", Attention((70, 5), (2, 1), heads=3, kv_heads=3, head_dim=40)),
    _attention("odd-head", Attention((70, 5), (2, 1), head_dim=33, block_size=7)),
    _attention("wide-head", Attention((19,), (2,), heads=2, head_dim=256, block_size=1)),
    _attention("window-1", Attention((70, 5), (4, 2), window=1)),
    _attention("window", Attention((200, 65, 5), (9, 1, 5), window=13)),
    _attention("window-run", Attention((200, 140), (3, 140), window=64)),
    _attention("soft-cap", Attention((70, 5), (4, 5), soft_cap=5.0)),
    _attention("window-soft-cap", Attention((150, 5), (4, 5), window=70, soft_cap=30.0)),
]

# embed


def embed_args(ids: Tensor, vocab: int, dim: int) -> Make:
    """A table of signs, scaled by a power of two: exact in every dtype."""
    return lambda seed, dtype: (_signs(seed, vocab, dim, dtype=dtype), ids, 0.5)


def _signs(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1: products of up to 128 of them are the same in every dtype, rounded or not."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


_EMBED = [
    Case("embed", "some", embed_args(torch.tensor([3, 0, 3, 8]), 9, 33), 0, "copies"),
    Case("embed", "short-ids", embed_args(torch.tensor([8, 1]).int(), 9, 16), 0, "copies"),
    Case("embed", "by-sequence", embed_args(torch.arange(8).view(4, 2).T[:, 1:].int(), 9, 7), 0, "copies"),
    Case("embed", "no-rows", embed_args(torch.arange(0), 9, 64), 0, "copies"),
]

# Fused products


def _input(
    seed: int, rows: int, features: int, dtype: torch.dtype, normed: bool
) -> tuple[Tensor, Norm | None]:
    return (
        _plain_rows(seed, rows, features, dtype)
        if normed
        else (_signs(seed, rows, features, dtype=dtype), None)
    )


def gated_linear_args(
    rows: int, features: int, dim: int, activation: str, bias: bool = False, normed: bool = False
) -> Make:
    def make(seed: int, dtype: torch.dtype) -> Args:
        x, norm = _input(seed, rows, features, dtype, normed)
        weight = _signs(seed + 1, 2 * dim, features, dtype=dtype)
        return x, weight, activation, _signs(seed + 2, 2 * dim, dtype=dtype) if bias else None, norm

    return make


def linear_rope_args(
    rows: int,
    features: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    bias: bool = False,
    normed: bool = False,
) -> Make:
    def make(seed: int, dtype: torch.dtype) -> Args:
        cols = (heads + 2 * kv_heads) * head_dim
        x, norm = _input(seed, rows, features, dtype, normed)
        weight = _signs(seed + 1, cols, features, dtype=dtype)
        rest = rope_append_args(rows, heads, kv_heads, head_dim, half)(seed, dtype)[3:]
        return x, weight, _signs(seed + 2, cols, dtype=dtype) if bias else None, *rest, norm

    return make


def linear_add_args(rows: int, features: int, cols: int, bias: bool = False) -> Make:
    """A residual stream of eighths: the op rounds its sum only, as the reference in fp64 does at the end."""

    def make(seed: int, dtype: torch.dtype) -> Args:
        x, weight = (_signs(seed + i, n, features, dtype=dtype) for i, n in enumerate((rows, cols)))
        residual = add_norm_args(rows, cols)(seed, dtype)[0]
        return x, weight, residual, _signs(seed + 2, cols, dtype=dtype) if bias else None

    return make


_SUM = "exact products, one rounding of their sum"
FUSED = [
    Case("linear_add", "bias", linear_add_args(5, 65, 33, bias=True), 1, _SUM),
    Case("linear_add", "wide", linear_add_args(20, 100, 7), 1, _SUM),
    Case("linear_add", "no-rows", linear_add_args(0, 64, 16), 1, _SUM),
    Case("gated_linear", "norm", gated_linear_args(5, 65, 33, "silu", normed=True), 6, _ACT),
    Case("linear_rope_append", "norm", linear_rope_args(3, 33, 2, 1, 40, 20, normed=True), 2, _ROPE),
    Case("gated_linear", "silu", gated_linear_args(5, 65, 33, "silu"), 6, _ACT),
    Case("gated_linear", "gelu", gated_linear_args(1, 100, 7, "gelu", bias=True), 6, _ACT),
    Case("gated_linear", "gelu_tanh", gated_linear_args(20, 64, 16, "gelu_tanh"), 6, _ACT),
    Case("gated_linear", "no-rows", gated_linear_args(0, 64, 16, "silu"), 6, _ACT),
    Case("linear_rope_append", "llama", linear_rope_args(7, 100, 4, 2, 64, 32), 2, _ROPE),
    Case("linear_rope_append", "bias", linear_rope_args(17, 65, 2, 1, 32, 16, bias=True), 2, _ROPE),
    Case("linear_rope_append", "partial", linear_rope_args(3, 33, 2, 1, 40, 10), 2, _ROPE),
    Case("linear_rope_append", "odd-half", linear_rope_args(1, 16, 1, 1, 14, 7), 2, _ROPE),
    Case("linear_rope_append", "no-rows", linear_rope_args(0, 16, 2, 1, 16, 8), 2, _ROPE),
]

# softmax_stats


def stats_args(rows: int, vocab: int, scale: float = 4.0) -> Make:
    return lambda seed, dtype: ((noise(seed)(rows, vocab) * scale).to(dtype),)


def _hidden_tokens(seed: int, dtype: torch.dtype) -> Args:
    logits = stats_args(7, 1025)(seed, dtype)[0]
    logits[:, ::3] = float("-inf")
    logits[3] = float("-inf")
    logits[4, 1:] = float("-inf")
    return (logits,)


def _some_nan(seed: int, dtype: torch.dtype) -> Args:
    logits = stats_args(5, 33)(seed, dtype)[0]
    logits[1, 30], logits[1, 7] = float("nan"), float("nan")
    logits[2, 32], logits[2, 31] = float("nan"), float("inf")
    return (logits,)


def _ties(seed: int, dtype: torch.dtype) -> Args:
    logits = stats_args(33, 257)(seed, dtype)[0]
    for row, other in enumerate(range(200, 233)):
        logits[row, row] = logits[row, other] = logits[row, 256] = 50.0
    logits[32] = 1.0
    return (logits,)


def at_least_one(args: Args, want: Tensor) -> Tensor:
    return want.abs().clamp(min=1.0)


def _stats(name: str, make: Make) -> Case:
    reason = "two-level sums of exponentials; the entropy is a difference of two of them"
    return Case("softmax_stats", name, make, 6, reason, at_least_one)


SHAPES = [(1, 1), (7, 33), (3, 1025), (2, 32001)]
STATS = [
    *(_stats(f"{rows}x{vocab}", stats_args(rows, vocab)) for rows, vocab in SHAPES),
    _stats("sharp", stats_args(7, 129, 60.0)),
    _stats("no-rows", stats_args(0, 33)),
    _stats("hidden-tokens", _hidden_tokens),
    _stats("nan", _some_nan),
    _stats("ties", _ties),
]

CASES = [*LINEAR, *_EMBED, *NORMS, *ROPE, *ELEMENTWISE, *CACHE, *FUSED, *STATS]
