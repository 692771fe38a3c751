"""Llama 2 and 3.x (arXiv 2307.09288, 2407.21783): the common decoder as it is."""

from nudging.models.families.standard import TENSORS, Family
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig

DEFAULTS = {"max_position_embeddings": 2048}  # as in transformers; the first conversions leave it out


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Llama checkpoint.  Raises CheckpointError."""
    return describe_standard(raw.over(DEFAULTS), mlp_bias=True)


FAMILY = Family(describe, TENSORS)
