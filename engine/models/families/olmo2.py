"""OLMo 2 (arXiv 2501.00656): norms after each block instead of before, QK-norm over all heads at once."""

from dataclasses import replace

from nudging.models.families.llama import DEFAULTS
from nudging.models.families.standard import POST_NORM_TENSORS, TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig


def describe(raw: RawConfig) -> ModelConfig:
    """The description of an OLMo 2 checkpoint.  Raises CheckpointError."""
    config = describe_standard(raw.over({**DEFAULTS, "rms_norm_eps": 1e-5}))
    return replace(config, pre_norm=False, post_norm=True, qk_norm="full")


FAMILY = Family(describe, {**TENSORS, **POST_NORM_TENSORS})
