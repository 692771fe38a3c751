"""Cases at the sizes of real models, for a GPU: Triton's interpreter would take hours."""

from __future__ import annotations

import torch

from tests.support.cases import (
    Attention,
    Case,
    Make,
    add_norm_args,
    at_least_one,
    gated_act_args,
    gated_linear_args,
    kv_append_args,
    largest_value,
    linear_args,
    linear_rope_args,
    noise,
    norm_args,
    rope_append_args,
    rope_args,
    soft_cap_args,
    stats_args,
    sum_of_sizes,
)

_SUMS = "at every 16 inputs tensor cores cut off what is below the last place of the sum so far"
_TREE = "a tree of additions, a square root, a division and two products"
_EXP = "the GPU's exponential, a division and two products, relative to the row's largest element"
_PAIR = "two products and a sum; cancellation is relative to the row's largest channel"


def layer_norm_args(rows: int, dim: int) -> Make:
    return lambda seed, dtype: (noise(seed)(rows, dim, dtype=dtype), 1e-5)


LARGE = [
    *(
        Case(
            "linear", f"{rows}x{features}x{cols}", linear_args(rows, features, cols), 16, _SUMS, sum_of_sizes
        )
        for rows, features, cols in [
            (1, 4096, 6144),
            (16, 14336, 4096),
            (5, 4864, 896),
            (40, 8192, 2048),
            (517, 4864, 896),
            (300, 4096, 4096),
        ]
    ),
    Case(
        "linear",
        "head",
        linear_args(5, 2048, 128256, bias=True, out=torch.float32),
        16,
        _SUMS,
        sum_of_sizes,
    ),
    Case("gated_linear", "llama-8b", gated_linear_args(9, 2048, 14336, "silu"), 8, _EXP),
    Case("gated_linear", "prefill", gated_linear_args(300, 2048, 4864, "gelu_tanh", bias=True), 8, _EXP),
    Case("linear_rope_append", "llama-8b", linear_rope_args(9, 2048, 32, 8, 128, 64), 2, _PAIR),
    Case("linear_rope_append", "prefill", linear_rope_args(300, 896, 14, 2, 64, 32, bias=True), 2, _PAIR),
    Case("rms_norm", "llama-70b", norm_args(33, 8192), 4, _TREE),
    Case("rms_norm", "heads", norm_args(33, 32, 128), 4, _TREE),
    Case("rms_norm", "gemma-27b", norm_args(600, 4608, unit_offset=True), 4, _TREE),
    Case("add_rms_norm", "llama-8b", add_norm_args(600, 4096), 4, _TREE),
    Case("layer_norm", "olmo-7b", layer_norm_args(600, 4096), 12, _TREE),
    Case("rope", "llama-8b", rope_args(600, 32, 128, 64), 2, _PAIR),
    Case("rope_append", "llama-8b", rope_append_args(600, 32, 8, 128, 64), 2, _PAIR),
    Case("kv_append", "llama-8b", kv_append_args(36, 8, 128), 0, "copies"),
    *(
        Case("gated_act", name, gated_act_args(600, 14336, name), 8, _EXP)
        for name in ("silu", "gelu", "gelu_tanh")
    ),
    Case("soft_cap", "gemma-27b", soft_cap_args(33, 256000, 30.0, 20.0), 4, _EXP),
]

# As ROWWISE: op, arguments of many rows, which of them are by row.
LARGE_ROWS: list[tuple[str, Make, tuple[int, ...]]] = [
    ("linear", linear_args(520, 4096, 6144), (0,)),
    ("linear", linear_args(520, 14336, 4096), (0,)),
    ("linear", linear_args(520, 4864, 896, bias=True), (0,)),
    ("linear", linear_args(70, 2048, 128256, out=torch.float32), (0,)),
    ("gated_linear", gated_linear_args(520, 4096, 14336, "silu"), (0,)),
    ("rms_norm", norm_args(520, 8192), (0,)),
    ("add_rms_norm", add_norm_args(520, 4096), (0, 1)),
    ("layer_norm", layer_norm_args(520, 4096), (0,)),
    ("rope", rope_args(520, 32, 128, 64), (0, 1)),
    ("gated_act", gated_act_args(520, 14336, "silu"), (0,)),
]

_FAR = "logits near 25 are wrong by some of their ulps, and so are the logs of the weights"
_MANY = "sums of 150000 exponentials; the entropy is a difference of two of them"
LARGE += [
    Case("paged_attention", name, make, 100, _FAR, largest_value)
    for name, make in [
        ("decode", Attention((5000, 300), (1, 9), heads=32, kv_heads=8, head_dim=128)),
        ("long", Attention((20000,), (5,), heads=14, kv_heads=2, head_dim=64)),
        ("prefill", Attention((700,), (700,), heads=16, kv_heads=8, head_dim=256, window=300, soft_cap=50.0)),
    ]
]
LARGE += [Case("softmax_stats", "qwen", stats_args(5, 151936), 32, _MANY, at_least_one)]
LARGE_ROWS += [("softmax_stats", stats_args(40, 151936), (0,))]
