"""Qwen3 (arXiv 2505.09388): Qwen2 without its biases, with RMS-normalised query and key heads."""

from dataclasses import replace

from nudging.models.families.qwen2 import DEFAULTS, upper_windows
from nudging.models.families.standard import TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Qwen3 checkpoint.  Raises CheckpointError."""
    raw = raw.over({**DEFAULTS, "head_dim": 128})
    config = describe_standard(raw)
    windows = upper_windows(raw, config.num_layers)
    return replace(config, windows=windows, qk_norm="head")


FAMILY = Family(describe, TENSORS)
