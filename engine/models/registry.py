"""From a checkpoint directory to a `ModelConfig`: which family it is, and which tokens end a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nudging.errors import BadRequest, CheckpointError
from nudging.models.families import gemma2, gemma3, llama, mistral, olmo, olmo2, phi3, qwen2, qwen3
from nudging.models.families.standard import Family
from nudging.models.json_config import RawConfig, read_json
from nudging.models.known_keys import refuse_unread
from nudging.models.model_config import ModelConfig, Rope
from nudging.models.windows import check_words

__all__ = ["FAMILIES", "ModelConfig", "Rope", "read_config"]

FAMILIES: Mapping[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "olmo": olmo.FAMILY,
    "olmo2": olmo2.FAMILY,
    "phi3": phi3.FAMILY,
}


def read_config(path: str | Path, max_len: int | None = None) -> ModelConfig:
    """The description of the checkpoint in directory `path`, for sequences of up to `max_len` tokens.

    `max_len` None: all that the position embedding allows, with LongRoPE the trained context.  Only JSON is
    read: `auto_map` and code beside it are not looked at.  Raises CheckpointError, and BadRequest for a
    `max_len` out of range.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a directory with config.json")
    raw = read_json(directory / "config.json")
    if raw.has("quantization_config"):
        raise CheckpointError(
            f"{raw.where}: quantization_config is set, quantised weights are not supported; "
            "give a checkpoint in float32, bfloat16 or float16"
        )
    family = raw.text("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{raw.where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    config = FAMILIES[family].describe(raw)
    check_words(raw, config.windows, config.max_position)
    refuse_unread(raw, f"a {family!r} model")
    text = raw.part("text_config")
    generation = RawConfig({}, "generation_config.json")
    if (directory / "generation_config.json").exists():
        generation = read_json(directory / "generation_config.json")
    config = replace(
        config,
        family=family,
        eos_token_ids=_first_ids("eos_token_id", (generation, raw, text), config.vocab_size),
        bos_token_id=_bos_id((raw, text), config.vocab_size),
        dtype=next((r.text(k) for r in (raw, text) for k in ("dtype", "torch_dtype") if r.has(k)), None),
    )
    return config if max_len is None else _limited(config, max_len)


def _limited(config: ModelConfig, max_len: int) -> ModelConfig:
    if isinstance(max_len, bool) or not isinstance(max_len, int) or not 1 <= max_len <= config.max_position:
        raise BadRequest(
            f"max_len {max_len!r} is not from 1 to {config.max_position}, the positions the checkpoint allows"
        )
    return replace(config, max_len=max_len)


def _bos_id(places: tuple[RawConfig, ...], vocab_size: int) -> int | None:
    """The first place's id, or none: some checkpoints have an id there that is none of theirs, and no use."""
    for place in places:
        if place.has("bos_token_id"):
            token = place.values["bos_token_id"]
            if isinstance(token, bool) or not isinstance(token, int):
                place.wrong("bos_token_id", "an id")
            return token if 0 <= token < vocab_size else None
    return None


def _first_ids(key: str, places: tuple[RawConfig, ...], vocab_size: int) -> tuple[int, ...]:
    """The token id or ids under `key` in the first place that has it; none where no place has it."""
    for place in places:
        if place.has(key):
            value = place.values[key]
            ids = value if isinstance(value, list) else [value]
            for i in ids:
                if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
                    place.wrong(key, f"an id from 0 to {vocab_size - 1}, or a list of such")
            return tuple(ids)
    return ()
