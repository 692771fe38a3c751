"""Gemma 2 (arXiv 2408.00118): norms before and after, scaled embeddings, soft-caps, alternate windows."""

from dataclasses import replace

from nudging.models.families.standard import ACTIVATIONS, POST_NORM_TENSORS, TENSORS, Family, RopeReader
from nudging.models.families.standard import describe as describe_standard
from nudging.models.json_config import RawConfig
from nudging.models.model_config import ModelConfig
from nudging.models.rope import read_rope
from nudging.models.windows import layer_windows, sliding_layers, window_of

# What transformers takes for keys that a configuration leaves out.
DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "tie_word_embeddings": True,
}


def describe_gemma(raw: RawConfig, rope_reader: RopeReader = read_rope) -> ModelConfig:
    """What Gemma 2 and 3 have in common.  Raises CheckpointError."""
    if raw.flag("use_bidirectional_attention", False):
        raw.wrong("use_bidirectional_attention", "false: this engine generates text from left to right")
    config = describe_standard(raw, activation_key="hidden_activation", rope_reader=rope_reader)
    # Gemma's own key decides; "gelu" in the other one is what its first releases said and did not do.
    if raw.has("hidden_act") and ACTIVATIONS.get(raw.text("hidden_act")) not in (config.activation, "gelu"):
        raw.wrong("hidden_act", "what hidden_activation is, which decides in this family, or missing")
    return replace(
        config,
        unit_offset=True,
        post_norm=True,
        attention_scale=raw.number("query_pre_attn_scalar") ** -0.5,
        embedding_scale=config.hidden_size**0.5,
        final_soft_cap=raw.number("final_logit_softcapping") if raw.has("final_logit_softcapping") else 0.0,
    )


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Gemma 2 checkpoint.  Raises CheckpointError."""
    raw = raw.over(DEFAULTS)
    config = describe_gemma(raw)
    sliding = sliding_layers(raw, config.num_layers, lambda i: i % 2 == 0)
    return replace(
        config,
        windows=layer_windows(raw, sliding, window_of(raw)),
        attention_soft_cap=raw.number("attn_logit_softcapping") if raw.has("attn_logit_softcapping") else 0.0,
    )


FAMILY = Family(describe, {**TENSORS, **POST_NORM_TENSORS})
