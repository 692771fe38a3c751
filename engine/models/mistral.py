"""Mistral (arXiv 2310.06825): Llama with a sliding window in every layer."""

from dataclasses import replace

from .raw import RawConfig
from .spec import ModelConfig
from .standard import TENSORS, Family, window_of
from .standard import describe as describe_standard

# What transformers takes for keys that a configuration leaves out; a null window means none.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Mistral checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    config = describe_standard(raw)
    return replace(
        config,
        windows=(window_of(raw),) * config.num_layers,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
    )


FAMILY = Family(describe, TENSORS)
