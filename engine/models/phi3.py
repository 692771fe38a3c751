"""Phi-3, 3.5 and 4-mini (arXiv 2404.14219): Llama with joined q, k, v and gate, up; LongRoPE."""

from collections.abc import Mapping
from dataclasses import replace

from .raw import RawConfig
from .rope import read_rope
from .spec import ModelConfig, Rope, RopeKind
from .standard import TENSORS, Family, window_of
from .standard import describe as describe_standard

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}

# The first releases called LongRoPE so.
LONGROPE: Mapping[str, RopeKind] = {"su": "longrope", "yarn": "longrope"}


def _read_rope(raw: RawConfig, head_dim: int, max_position: int) -> tuple[Rope, int]:
    return read_rope(raw, head_dim, max_position, partial=True, aliases=LONGROPE)


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Phi-3 checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    for key in ("lm_head_bias", "attention_bias", "mlp_bias"):
        if raw.flag(key, False):
            raw.wrong(key, "false in this family")
    config = describe_standard(raw, rope_reader=_read_rope)
    return replace(config, windows=(window_of(raw),) * config.num_layers)


FAMILY = Family(
    describe,
    {**TENSORS, "qkv": ("self_attn.qkv_proj.weight",), "gate_up": ("mlp.gate_up_proj.weight",)},
)
