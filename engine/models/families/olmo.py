"""OLMo (arXiv 2402.00838): Llama with norms that have no parameters, and clipped q, k, v."""

from dataclasses import replace

from nudging.models.families.llama import DEFAULTS
from nudging.models.families.standard import TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig


def describe(raw: RawConfig) -> ModelConfig:
    """The description of an OLMo checkpoint.  Raises CheckpointError."""
    config = describe_standard(raw.over(DEFAULTS))
    clip = raw.number("clip_qkv") if raw.has("clip_qkv") else 0.0
    # Its norms have this epsilon whatever rms_norm_eps says, as in transformers.
    return replace(config, norm="layer", norm_eps=1e-5, clip_qkv=clip)


FAMILY = Family(describe, TENSORS)
