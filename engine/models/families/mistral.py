"""Mistral (arXiv 2310.06825): Llama with a sliding window, in every layer or in those of `layer_types`."""

from dataclasses import replace

from nudging.models.families.standard import TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig
from nudging.models.windows import layer_windows, sliding_layers, window_of

# What transformers takes for keys that a configuration leaves out; a null window means none.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Mistral checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    config, window = describe_standard(raw, attention_bias=False), window_of(raw)
    sliding = sliding_layers(raw, config.num_layers, lambda i: window > 0)
    return replace(config, windows=layer_windows(raw, sliding, window))


FAMILY = Family(describe, TENSORS)
