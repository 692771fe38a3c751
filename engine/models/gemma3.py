"""Gemma 3, the text decoder (arXiv 2503.19786): Gemma 2 with QK-norm, no soft-cap, five sliding layers to one
full, and a rotary base of its own for the sliding ones."""

from dataclasses import replace

from .gemma2 import describe_gemma
from .raw import RawConfig
from .rope import build_rope
from .spec import ModelConfig, Rope
from .standard import MAX_LAYERS, POST_NORM_TENSORS, TENSORS, Family, layer_windows, sliding_layers, window_of

# What transformers takes for keys that a configuration leaves out; multimodal checkpoints leave out most.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def _read_full(raw: RawConfig, head_dim: int, max_position: int) -> tuple[Rope, int]:
    """The rotary embedding of the full layers, and the positions it allows."""
    if raw.has("rope_parameters"):
        params = raw.part("rope_parameters").part("full_attention")
    else:
        params = raw.part("rope_scaling")
    params = params.over({"rope_theta": raw.values.get("rope_theta", 1_000_000.0)})
    return build_rope(raw, params, head_dim, max_position)


def _read_sliding(raw: RawConfig, head_dim: int, max_position: int) -> Rope:
    """The rotary embedding of the sliding layers."""
    params = raw.part("rope_parameters").part("sliding_attention")
    params = params.over({"rope_theta": raw.values.get("rope_local_base_freq", 10_000.0)})
    return build_rope(raw, params, head_dim, max_position)[0]


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Gemma 3 checkpoint, text only or multimodal.  Raises CheckpointError."""
    text = raw.part("text_config") if raw.text("model_type") == "gemma3" else raw
    text = text.over({**DEFAULTS, "model_type": "gemma3_text"})
    if text.has("attn_logit_softcapping"):
        text.wrong("attn_logit_softcapping", "null in Gemma 3")
    config = describe_gemma(text, rope_reader=_read_full)
    period = text.integer("sliding_window_pattern", MAX_LAYERS, default=6)
    sliding = sliding_layers(text, config.num_layers, lambda i: (i + 1) % period != 0)
    local = _read_sliding(text, config.head_dim, config.max_position)
    return replace(
        config,
        qk_norm="head",
        windows=layer_windows(text, sliding, window_of(text)),
        ropes=tuple(local if slides else config.ropes[0] for slides in sliding),
    )


FAMILY = Family(
    describe,
    {**TENSORS, **POST_NORM_TENSORS},
    prefixes=("model.", "language_model.model.", "model.language_model."),
    ignored=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
