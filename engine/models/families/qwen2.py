"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k, v; a sliding window in the upper layers if wanted."""

from dataclasses import replace

from nudging.models.families.standard import MAX_LAYERS, TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig
from nudging.models.windows import layer_windows, sliding_layers, window_of

DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}


def upper_windows(raw: RawConfig, num_layers: int) -> tuple[int, ...]:
    """Qwen's rule: with `use_sliding_window`, the layers from `max_window_layers` on slide."""
    window, uses = window_of(raw), raw.flag("use_sliding_window", False)
    first = raw.integer("max_window_layers", MAX_LAYERS, default=28, least=0)
    slides = uses and raw.has("sliding_window")
    sliding = sliding_layers(raw, num_layers, lambda i: slides and i >= first)
    if any(sliding) and not uses:
        raw.wrong("use_sliding_window", "true where layer_types has sliding layers")
    return layer_windows(raw, sliding, window)


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Qwen2 checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    config = describe_standard(raw, attention_bias=False)
    raw.flag("attention_bias", True)  # q, k and v have theirs whatever it says; the tensors show it
    return replace(config, windows=upper_windows(raw, config.num_layers), qkv_bias=True)


FAMILY = Family(describe, TENSORS)
