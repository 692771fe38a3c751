"""How large a run is: real models on a GPU, or a rehearsal that proves the program on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.inflate import SHAPES, shape


@dataclass(frozen=True)
class Scale:
    """`pairs`: for each name the shapes of a base and a guide; the rest are sizes of what is measured.

    copies: bytes that the copies of one small weight take together, more than any cache holds; ahead: seconds
    for recordings that are made ahead.
    """

    pairs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
    memory: int
    copies: int
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int
    nodes: int
    questions: int
    rounds: int
    tokens: int
    drafts: tuple[int, ...]
    kv_cache: str
    ahead: float


def named(base: str, guide: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    longer = {"max_position_embeddings": 16384}
    return SHAPES[base] | longer, SHAPES[guide] | longer


FULL = Scale(
    {
        "llama 8b+1b": named("llama-3.1-8b", "llama-3.2-1b"),
        "qwen 7b+0.5b": named("qwen2.5-7b", "qwen2.5-0.5b"),
    },
    memory=4 << 30,
    copies=512 << 20,
    contexts=(1024, 4096, 16000),
    rows=(1, 2, 4, 8, 16),
    batches=(1, 2, 4, 8, 16, 32, 64),
    repeats=20,
    nodes=500,
    questions=3,
    rounds=3,
    tokens=48,
    drafts=(2, 4, 8),
    kv_cache="8GiB",
    ahead=10.0,
)

TINY = Scale(
    {
        "tiny": (
            shape(256, 6, 8, 4, 512, 2304) | {"max_position_embeddings": 512},
            shape(224, 4, 7, 1, 320, 2304) | {"model_type": "qwen2", "max_position_embeddings": 512},
        )
    },
    memory=1 << 20,
    copies=1 << 18,
    contexts=(64, 128, 256),
    rows=(1, 2),
    batches=(1, 2),
    repeats=2,
    nodes=3,
    questions=1,
    rounds=1,
    tokens=6,
    drafts=(2,),
    kv_cache="8MiB",
    ahead=0.5,
)
