"""Gemma 3, the text decoder (arXiv 2503.19786): Gemma 2 with QK-norm, no soft-cap, five sliding layers to one
full, and a rotary base of its own for the sliding ones."""

from dataclasses import replace

from nudging.models.families.gemma2 import describe_gemma
from nudging.models.families.standard import MAX_LAYERS, POST_NORM_TENSORS, TENSORS, Family
from nudging.models.json_config import RawConfig
from nudging.models.known_keys import refuse_unread
from nudging.models.model_config import ModelConfig, Rope
from nudging.models.rope import build_rope, merged
from nudging.models.windows import check_words, layer_windows, sliding_layers, window_of

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

IMAGE_IDS = tuple(f"{kind}_token_{word}" for kind in ("boi", "eoi", "image") for word in ("index", "id"))


def _read_full(raw: RawConfig, head_dim: int, max_position: int) -> tuple[Rope, int]:
    """The rotary embedding of the full layers, and the positions it allows."""
    new = raw.part("rope_parameters").part("full_attention")
    old = raw.part("rope_scaling")
    if old.get("type", "default") != "default" and not old.has("rope_type"):
        old.wrong("type", "called rope_type in this family, whose code reads no other name")
    params = merged(raw, new, old, {"rope_theta": "rope_theta"})
    return _build(params.over({"rope_theta": 1_000_000.0}), head_dim, max_position)


def _read_sliding(raw: RawConfig, head_dim: int, max_position: int) -> Rope:
    """The rotary embedding of the sliding layers."""
    new = raw.part("rope_parameters").part("sliding_attention")
    params = merged(raw, new, RawConfig({}, new.where), {"rope_theta": "rope_local_base_freq"})
    return _build(params.over({"rope_theta": 10_000.0}), head_dim, max_position)[0]


def _build(params: RawConfig, head_dim: int, max_position: int) -> tuple[Rope, int]:
    """The rotary embedding of one kind of layers, from its own parameters alone, as in transformers."""
    if not params.flag("truncate", True):
        params.wrong("truncate", "true in this family, where transformers does not read it")
    return build_rope(RawConfig({}, params.where), params, head_dim, max_position)


def _text_of(raw: RawConfig) -> RawConfig:
    """The part of a multimodal configuration that describes the decoder, with what stands beside it."""
    text = raw.part("text_config")
    for key in ("vision_config", "mm_tokens_per_image", *IMAGE_IDS):
        raw.get(key)
    tied = [part.flag("tie_word_embeddings", True) for part in (raw, text) if part.has("tie_word_embeddings")]
    if len(set(tied)) == 2:
        raw.wrong("tie_word_embeddings", "what text_config has there, or missing")
    return text.over({"tie_word_embeddings": raw.flag("tie_word_embeddings", True)})


def describe(raw: RawConfig) -> ModelConfig:
    """The description of a Gemma 3 checkpoint, text only or multimodal.  Raises CheckpointError."""
    is_multimodal = raw.text("model_type") == "gemma3"
    given = _text_of(raw) if is_multimodal else raw
    text = given.over({**DEFAULTS, "model_type": "gemma3_text"})
    if text.has("attn_logit_softcapping"):
        text.wrong("attn_logit_softcapping", "null in Gemma 3")
    config = describe_gemma(text, rope_reader=_read_full)
    sliding = _sliding(text, config.num_layers)
    refuse_unread(_both_kinds(text), "Gemma 3: full_attention and sliding_attention hold them", ())
    local = _read_sliding(text, config.head_dim, config.max_position)
    config = replace(
        config,
        qk_norm="head",
        windows=layer_windows(text, sliding, window_of(text)),
        ropes=tuple(local if slides else config.ropes[0] for slides in sliding),
    )
    if is_multimodal:
        check_words(text, config.windows, config.max_position)
        refuse_unread(text, "a 'gemma3_text' model")
    return config


def _sliding(text: RawConfig, num_layers: int) -> tuple[bool, ...]:
    """Which layers slide: by `layer_types`, else all but each sixth, or what the pattern says."""
    period = text.integer("sliding_window_pattern", MAX_LAYERS, default=6)
    # transformers writes this one beside layer_types and never reads it.
    written = text.integer("_sliding_window_pattern", MAX_LAYERS, default=period)
    if written != period and not text.has("layer_types"):
        text.wrong("_sliding_window_pattern", f"{period} or missing without layer_types")
    return sliding_layers(text, num_layers, lambda i: (i + 1) % period != 0)


def _both_kinds(text: RawConfig) -> RawConfig:
    """The rotary parameters, both kinds of layers read."""
    params = text.part("rope_parameters")
    params.seen.update(("full_attention", "sliding_attention"))
    return params


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
