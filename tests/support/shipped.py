"""Calls of the Triton implementations at the sizes of real models, on tensors without data.

Each names the model's shape it stands for; tests/support/aot.py compiles what it launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from nudging.kernels.cuda import ARRIVALS
from nudging.kernels.draft_limits import MAX_DRAFT, WIDTH
from nudging.kernels.rms_norm import Norm
from nudging.kernels.rope_append import HeadNorm
from nudging.kernels.weight import Int8Weight, Weight
from tests.support.cases import load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HIDDEN = {"qwen-0.5b": 896, "llama-1b": 2048, "llama-8b": 4096, "gemma-27b": 4608, "llama-70b": 8192}
HEADS = {"qwen-0.5b": (14, 2, 64), "llama-8b": (32, 8, 128), "gemma-2b": (8, 4, 256)}

Args = tuple[Any, ...]
SHIPPED: dict[str, Callable[[], Any]] = {}


def ship(op: str, name: str, make: Callable[[torch.dtype], Args], dtypes: Iterable[str] = DTYPES) -> None:
    """The op's Triton implementation on make(dtype), for each of these dtypes."""
    run = next(found.run for found in load(op).implementations if found.name == "triton")
    for short in dtypes:
        SHIPPED[f"{op} {name} {short}"] = lambda dtype=DTYPES[short]: run(*make(dtype))


def norm_args(*shape: int) -> Callable[[torch.dtype], Args]:
    return lambda dtype: (torch.empty(shape, dtype=dtype), torch.empty(shape[-1], dtype=dtype), 1e-5)


def add_norm_args(rows: int, dim: int) -> Callable[[torch.dtype], Args]:
    return lambda dtype: (torch.empty(rows, dim, dtype=dtype), *norm_args(rows, dim)(dtype))


def rope_args(heads: int, kv_heads: int, head_dim: int) -> Callable[[torch.dtype], Args]:
    """Queries, keys and values as slices of one projection, tables, caches, slots: what rope_append takes."""

    def make(dtype: torch.dtype) -> Args:
        fused = torch.empty(16, heads + 2 * kv_heads, head_dim, dtype=dtype)
        table = torch.empty(8192, head_dim // 2)
        positions = torch.empty(16, dtype=torch.int64)
        caches = torch.empty(2, 1024, 16, kv_heads, head_dim, dtype=dtype)
        q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
        return q, k, v, positions, table, table, caches[0], caches[1], positions

    return make


def arrivals() -> torch.Tensor:
    return torch.empty(ARRIVALS, dtype=torch.int32)


def with_more(
    make: Callable[[torch.dtype], Args], more: Callable[[torch.dtype], Args]
) -> Callable[[torch.dtype], Args]:
    """The arguments of both."""
    return lambda dtype: (*make(dtype), *more(dtype))


def pick(make: Callable[[torch.dtype], Args], *which: int) -> Callable[[torch.dtype], Args]:
    return lambda dtype: tuple(make(dtype)[i] for i in which)


BF16 = ("bf16",)

for model, dim in HIDDEN.items():
    ship("rms_norm", model, norm_args(16, dim), BF16)
    ship("add_rms_norm", model, add_norm_args(16, dim), BF16)
ship("rms_norm", "llama-8b", norm_args(16, 4096))
ship("add_rms_norm", "llama-8b", add_norm_args(16, 4096))
ship("add_rms_norm", "widest", add_norm_args(16, 1 << 14), BF16)
ship(
    "add_rms_norm",
    "gemma-27b",
    with_more(add_norm_args(16, 4608), lambda dtype: (True, torch.empty(4608, dtype=dtype))),
)
for head_dim in (64, 128):
    ship("rms_norm", f"heads-{head_dim}", norm_args(16, 8, head_dim), BF16)
for model, dim in (("qwen-0.5b", 896), ("gemma-27b", 4608), ("widest", 1 << 14)):
    ship(
        "embed", model, lambda dtype, dim=dim: (torch.empty(9, dim, dtype=dtype), torch.empty(16).int(), 2.0)
    )
ship("layer_norm", "olmo-7b", pick(norm_args(16, 4096), 0, 2))
for model, heads in HEADS.items():
    ship("rope_append", model, rope_args(*heads), BF16)
ship("rope_append", "llama-8b", rope_args(32, 8, 128))


def head_norm(q: int, k: int, unit_offset: bool) -> Callable[[torch.dtype], Args]:
    return lambda dtype: (
        HeadNorm(torch.empty(q, dtype=dtype), torch.empty(k, dtype=dtype), 1e-6, unit_offset),
    )


ship("rope_append", "qwen3-8b", with_more(rope_args(32, 8, 128), head_norm(128, 128, False)))
ship("rope_append", "gemma3-4b", with_more(rope_args(8, 4, 256), head_norm(256, 256, True)), BF16)
ship("rope_append", "olmo2-7b", with_more(rope_args(32, 32, 128), head_norm(4096, 4096, False)), BF16)
ship("rope", "llama-8b", pick(rope_args(32, 8, 128), 0, 3, 4, 5))
ship("kv_append", "llama-8b", pick(rope_args(32, 8, 128), 1, 2, 6, 7, 8))
for activation in ("silu", "gelu", "gelu_tanh"):
    ship("gated_act", activation, lambda dtype, name=activation: (torch.empty(16, 28672, dtype=dtype), name))
ship("soft_cap", "gemma-27b", lambda dtype: (torch.empty(16, 256000, dtype=dtype), 30.0))


def weight_of(cols: int, features: int, dtype: torch.dtype, int8: bool) -> Weight:
    if not int8:
        return torch.empty(cols, features, dtype=dtype)
    return Int8Weight(torch.empty(cols, features, dtype=torch.int8), torch.empty(cols))


def norm_of(rows: int, features: int, dtype: torch.dtype) -> Norm:
    """A norm whose squares are there, of at most 16 rows; else one that is a launch of its own."""
    squares = torch.empty(rows, -(-features // 16)) if rows <= 16 else None
    return Norm(torch.empty(features, dtype=dtype), 1e-5, False, squares)


Product = Callable[[int, int, int, bool], Callable[[torch.dtype], Args]]


def linear_args(
    rows: int, cols: int, features: int, int8: bool = False, out: Any = None, normed: bool = False
) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        norm = norm_of(rows, features, dtype) if normed else None
        return (
            torch.empty(rows, features, dtype=dtype),
            weight_of(cols, features, dtype, int8),
            None,
            out,
            norm,
        )

    return make


def add_args(rows: int, cols: int, features: int, int8: bool = False) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        x, weight = linear_args(rows, cols, features, int8)(dtype)[:2]
        return x, weight, torch.empty(rows, cols, dtype=dtype), None, arrivals()

    return make


def gated_args(rows: int, cols: int, features: int, int8: bool = False) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        x, weight = linear_args(rows, cols, features, int8)(dtype)[:2]
        return x, weight, "silu", None, norm_of(rows, features, dtype)

    return make


def linear_rope_args(
    rows: int, cols: int, features: int, int8: bool = False, head_dim: int = 128
) -> Callable[[torch.dtype], Args]:
    """As many heads as the columns make, one of them for keys, one for values."""

    def make(dtype: torch.dtype) -> Args:
        positions, table = torch.empty(rows, dtype=torch.int64), torch.empty(8192, head_dim // 2)
        caches = torch.empty(2, 1024, 16, 1, head_dim, dtype=dtype)
        product = linear_args(rows, cols, features, int8)(dtype)[:3]
        return *product, positions, table, table, *caches, positions, norm_of(rows, features, dtype)

    return make


TWO = ("fp32", "bf16")
# Calls that have every tile, with and without partitions: the weight's columns and inputs, numbers of rows.
SKINNY_AND_WIDE, SKINNY = (8, 16, 32, 64, 512), (8, 16)
PRODUCTS: list[tuple[str, Product, str, int, int, tuple[int, ...], Iterable[str], bool]] = [
    ("linear_add", add_args, "qwen-0.5b-down", 896, 4864, SKINNY_AND_WIDE, DTYPES, False),
    ("linear_add", add_args, "llama-1b-down", 2048, 8192, (16, 64), BF16, False),
    ("linear_add", add_args, "llama-8b-down", 4096, 14336, SKINNY_AND_WIDE, TWO, False),
    ("linear_add", add_args, "int8-qwen-0.5b-down", 896, 4864, (8, 16, 64), BF16, True),
    ("linear_add", add_args, "int8-llama-8b-down", 4096, 14336, (8, 64), DTYPES, True),
    ("linear", linear_args, "gemma-2b-down", 2304, 9216, (16, 64), BF16, False),
    ("linear", linear_args, "short-and-deep", 896, 4864, SKINNY, DTYPES, False),
    ("linear", linear_args, "int8-gemma-2b-down", 2304, 9216, SKINNY, BF16, True),
    ("linear_rope_append", linear_rope_args, "qwen-0.5b", 1152, 896, SKINNY, BF16, False),
    ("linear_rope_append", linear_rope_args, "llama-8b", 6144, 4096, SKINNY_AND_WIDE, TWO, False),
    ("linear_rope_append", linear_rope_args, "llama-70b", 10240, 8192, SKINNY, BF16, False),
    ("linear_rope_append", linear_rope_args, "int8-llama-8b", 6144, 4096, (16, 64), BF16, True),
    ("gated_linear", gated_args, "qwen-0.5b", 9728, 896, SKINNY, BF16, False),
    ("gated_linear", gated_args, "llama-8b", 28672, 4096, SKINNY_AND_WIDE, TWO, False),
    ("gated_linear", gated_args, "llama-70b", 57344, 8192, SKINNY, BF16, False),
    ("gated_linear", gated_args, "int8-llama-8b", 28672, 4096, (8, 16, 64), BF16, True),
]
for op, make, model, cols, features, some_rows, dtypes, int8 in PRODUCTS:
    for rows in some_rows:
        ship(op, f"{model}-{rows}", make(rows, cols, features, int8), dtypes)
for rows in SKINNY_AND_WIDE:
    ship("linear", f"llama-8b-head-{rows}", linear_args(rows, 128256, 4096, out=torch.float32), BF16)
ship("linear", "qwen3-8b-qkv", linear_args(16, 6144, 4096, normed=True), DTYPES)
ship("linear", "normed-short-and-deep", linear_args(16, 896, 4864, normed=True), BF16)
# Families with other norms: no norm in the product.
ship("linear_rope_append", "gemma-2b", pick(linear_rope_args(16, 3072, 2304), *range(9)), BF16)


def heads_args(
    rows: int, cols: int, features: int, head_dim: int, unit_offset: bool, int8: bool = False
) -> Any:
    """What normalises its heads."""
    norms = head_norm(head_dim, head_dim, unit_offset)
    return with_more(
        linear_rope_args(rows, cols, features, int8, head_dim),
        lambda dtype: (*norms(dtype), arrivals()),
    )


ship("linear_rope_append", "qwen3-0.6b", heads_args(8, 4096, 1024, 128, False), BF16)
ship("linear_rope_append", "qwen3-8b", heads_args(16, 6144, 4096, 128, False))
ship("linear_rope_append", "int8-qwen3-8b", heads_args(16, 6144, 4096, 128, False, True), BF16)
ship("linear_rope_append", "gemma3-1b", heads_args(8, 1536, 1152, 256, True), BF16)
ship("linear_rope_append", "gemma3-27b", heads_args(16, 8192, 5376, 128, True), BF16)
ship("gated_linear", "gemma-2b", pick(gated_args(16, 18432, 2304), 0, 1, 2), BF16)


def attention_args(
    queries: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int = 0,
    cap: float = 0.0,
    counted: bool = True,
) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        caches = (torch.empty(1024, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        tables, cu, lengths = (torch.empty(s, dtype=torch.int32) for s in ((2, length // 16), (3,), (2,)))
        q = torch.empty(queries, heads, head_dim, dtype=dtype)
        how = (head_dim**-0.5, window, cap, arrivals() if counted else None)
        return q, *caches, tables, cu, lengths, *how

    return make


# Few queries take splits of their own, many take all in one program.
for model, dtypes, *shape in [
    ("qwen-0.5b", ("fp32", "fp16"), 14, 2, 64),
    ("phi-2b", ("bf16",), 32, 32, 80),
    ("llama-8b", ("bf16",), 32, 8, 128),
    ("gemma-9b", ("fp32", "bf16"), 16, 8, 256, 4096, 50.0),
]:
    ship("paged_attention", f"{model} decode", attention_args(10, 8192, *shape), dtypes)
    ship("paged_attention", f"{model} prefill", attention_args(8192, 8192, *shape), dtypes)
ship("paged_attention", "llama-8b uncounted", attention_args(10, 8192, 32, 8, 128, counted=False), BF16)
for model, vocab in [("llama-2", 32000), ("qwen", 151936)]:
    ship("softmax_stats", model, lambda dtype, vocab=vocab: (torch.empty(16, vocab, dtype=dtype),), ("fp32",))


def pick_args(dtype: torch.dtype) -> Args:
    warm, k, p, faint, seed, position = (torch.empty(16) for _ in range(6))
    return torch.empty(16, 128256, dtype=dtype), warm, k.int(), p, faint, seed.long(), position.long()


ship("pick_rows", "llama-3", pick_args, ("fp32",))


def head_args(
    rows: int, vocab: int, features: int, cap: float, int8: bool = False
) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        x, weight = torch.empty(rows, features, dtype=dtype), weight_of(vocab, features, dtype, int8)
        ids, norm = torch.empty(rows, dtype=torch.int64), norm_of(rows, features, dtype)
        return x, weight, vocab, cap, torch.empty(rows), ids, ids, ids, norm

    return make


for rows in (8, 64):
    ship("lm_head", f"llama-8b-{rows}", head_args(rows, 128256, 4096, 0.0), ("fp32", "bf16"))
ship("lm_head", "int8-llama-8b-16", head_args(16, 128256, 4096, 0.0, True), ("fp32", "bf16"))
ship("lm_head", "gemma-2b-16", head_args(16, 256000, 2304, 30.0), ("bf16",))


def mix_args(probabilities: bool) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        one = torch.empty(16)
        return torch.empty(3, 16, 128256, dtype=dtype), torch.empty(3, 16), probabilities, 0, one, one

    return make


ship("mix_logits", "logits", mix_args(False), ("fp32",))
ship("mix_logits", "probabilities", mix_args(True), ("fp32",))


def verify_args(dtype: torch.dtype) -> Args:
    rows = 8, MAX_DRAFT + 1
    floats, ids = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=torch.int32)
    one, yes = torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.bool)
    path, marks = torch.empty(8, WIDTH, dtype=torch.int32), torch.empty(128256, dtype=torch.uint8)
    return floats, floats, ids, one, path, one, one.double(), yes, yes, yes, one, marks


ship("draft_verify", "eight", verify_args, ("fp32",))


def cycle_rows_args(drafts: int) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        state, lengths, one = (torch.empty(shape, dtype=torch.int32) for shape in ((6, 8), (2, 8), (8,)))
        table = torch.empty(8, 512, dtype=torch.int32)
        picks = one.float(), one.long()
        return state, lengths, one, one.long(), *picks, table, table, lengths, drafts, 16, 1 << 20, 1 << 20

    return make


def cycle_advance_args(drafts: int) -> Callable[[torch.dtype], Args]:
    def make(dtype: torch.dtype) -> Args:
        state, one, tokens = (torch.empty(shape, dtype=torch.int32) for shape in ((6, 8), (8,), (8, WIDTH)))
        guide_said, base_said = (
            torch.empty(shape, dtype=torch.int32) for shape in ((4, 2 + drafts, 8), (4, 8 * (drafts + 1)))
        )
        return state, one, tokens, one, one.to(torch.int8), guide_said[:, 2:], base_said

    return make


for drafts, name in ((4, "eight"), (0, "eight alone")):
    ship("cycle_rows", name, cycle_rows_args(drafts), ("fp32",))
    ship("cycle_advance", name, cycle_advance_args(drafts), ("fp32",))
