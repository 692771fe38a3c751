"""Calls of the Triton implementations at the sizes of real models, on tensors without data.

Each names the model's shape it stands for; tests/aot.py compiles what it launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.cases import load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HIDDEN = {"qwen-0.5b": 896, "llama-1b": 2048, "llama-8b": 4096, "gemma-27b": 4608, "llama-70b": 8192}

SHIPPED: dict[str, Callable[[], Any]] = {}


def ship(op: str, name: str, make: Callable[[torch.dtype], tuple[Any, ...]]) -> None:
    """The op's Triton implementation on make(dtype), for every dtype."""
    run = next(found.run for found in load(op).implementations if found.name == "triton")
    for short, dtype in DTYPES.items():
        SHIPPED[f"{op} {name} {short}"] = lambda dtype=dtype: run(*make(dtype))


def norm_args(*shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: (torch.empty(shape, dtype=dtype), torch.empty(shape[-1], dtype=dtype), 1e-5)


for model, dim in HIDDEN.items():
    ship("rms_norm", model, norm_args(16, dim))
for head_dim in (64, 128):
    ship("rms_norm", f"heads-{head_dim}", norm_args(16, 8, head_dim))
ship("soft_cap", "gemma", lambda dtype: (torch.empty(16, 256000, dtype=dtype), 30.0))
