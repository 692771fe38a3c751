"""Phi-3, 3.5 and 4-mini (arXiv 2404.14219): Llama with joined q, k, v and gate, up; LongRoPE."""

from collections.abc import Mapping
from dataclasses import replace

from nudging.errors import CheckpointError
from nudging.models.families.standard import TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig, Rope, RopeKind
from nudging.models.rope import read_rope
from nudging.models.windows import window_of

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}

# The first releases called LongRoPE so.
LONGROPE: Mapping[str, RopeKind] = {"su": "longrope", "yarn": "longrope"}


def _read_rope(raw: RawConfig, head_dim: int, max_position: int) -> tuple[Rope, int]:
    rope, position = read_rope(raw, head_dim, max_position, partial=True, aliases=LONGROPE)
    if rope.kind not in ("default", "longrope"):
        raise CheckpointError(
            f"{raw.where}: rope type {rope.kind!r} is not supported in this family; supported: longrope"
        )
    return rope, position


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Phi-3 checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    config = describe_standard(raw, rope_reader=_read_rope, attention_bias=False)
    return replace(config, windows=(window_of(raw),) * config.num_layers)


FAMILY = Family(
    describe,
    {**TENSORS, "qkv": ("self_attn.qkv_proj.weight",), "gate_up": ("mlp.gate_up_proj.weight",)},
)
