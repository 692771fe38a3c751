"""Phi-3, 3.5 and 4-mini (arXiv 2404.14219): Llama with joined q, k, v and gate, up; LongRoPE."""

from collections.abc import Mapping
from dataclasses import replace

from .raw import RawConfig
from .rope import read_rope
from .spec import ModelConfig, RopeKind
from .standard import TENSORS, Family, window_of
from .standard import describe as describe_standard

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}

# The first releases called LongRoPE so.
LONGROPE: Mapping[str, RopeKind] = {"su": "longrope", "yarn": "longrope"}


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Phi-3 checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    for key in ("lm_head_bias", "attention_bias", "mlp_bias"):
        if raw.flag(key, False):
            raw.wrong(key, "false in this family")
    plain = ("rope_parameters", "rope_scaling", "partial_rotary_factor")
    config = describe_standard(RawConfig({k: v for k, v in raw.values.items() if k not in plain}, raw.where))
    rope, position = read_rope(raw, config.head_dim, config.max_position, partial=True, aliases=LONGROPE)
    return replace(
        config,
        ropes=(rope,) * config.num_layers,
        max_len=rope.original_max_len if rope.kind == "longrope" else position,
        max_position=position,
        windows=(window_of(raw),) * config.num_layers,
    )


FAMILY = Family(
    describe,
    {**TENSORS, "qkv": ("self_attn.qkv_proj.weight",), "gate_up": ("mlp.gate_up_proj.weight",)},
)
