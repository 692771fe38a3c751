"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k, v; a sliding window in the upper layers if wanted."""

from dataclasses import replace

from .raw import RawConfig
from .spec import ModelConfig
from .standard import MAX_LAYERS, TENSORS, Family, layer_windows, sliding_layers, window_of
from .standard import describe as describe_standard

DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}


def upper_windows(raw: RawConfig, num_layers: int) -> tuple[int, ...]:
    """Qwen's rule: with `use_sliding_window`, the layers from `max_window_layers` on slide."""
    window = window_of(raw) if raw.flag("use_sliding_window", False) else 0
    first = raw.integer("max_window_layers", MAX_LAYERS, default=28, least=0)
    sliding = sliding_layers(raw, num_layers, lambda i: window > 0 and i >= first)
    return layer_windows(raw, sliding, window)


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Qwen2 checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    config = describe_standard(raw)
    windows = upper_windows(raw, config.num_layers)
    return replace(config, windows=windows, qkv_bias=True, o_bias=False, mlp_bias=False)


FAMILY = Family(describe, TENSORS)
