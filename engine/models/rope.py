"""Rotary position embedding: the configurations in use, and their tables.

Sources: RoPE arXiv 2104.09864; "linear" arXiv 2306.15595; "dynamic" and "yarn" arXiv 2309.00071; "llama3" the
Llama 3.1 release (arXiv 2407.21783); "longrope" arXiv 2402.13753.  The arithmetic is fp32 in the order of
transformers' reference implementation, so that far positions have the same angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from nudging.errors import CheckpointError
from nudging.models.json_config import RawConfig, printable, shown
from nudging.models.known_keys import ROPE_HARMLESS, ROPE_NEUTRAL, refuse_unread
from nudging.models.model_config import Rope, RopeKind

MAX_POSITION = 1 << 24  # the tables of this many positions already take gigabytes

KINDS: Mapping[str, RopeKind] = {kind: kind for kind in get_args(RopeKind)}
Aliases = Mapping[str, RopeKind] | None


def read_rope(
    raw: RawConfig, head_dim: int, max_position: int, partial: bool = False, aliases: Aliases = None
) -> tuple[Rope, int]:
    """The rotary embedding of a configuration, and the positions it allows.

    Takes `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4).  partial: the family
    knows `partial_rotary_factor`; aliases: the family's own names of kinds.  Raises CheckpointError.
    """
    new, old = raw.part("rope_parameters"), raw.part("rope_scaling")
    outer = {key: key for key in ("rope_theta", "partial_rotary_factor")}
    params = merged(raw, new, old, outer, aliases)
    return build_rope(raw, params, head_dim, max_position, partial)


def merged(
    raw: RawConfig, new: RawConfig, old: RawConfig, outer: Mapping[str, str], aliases: Aliases = None
) -> RawConfig:
    """The rotary parameters from all places that may hold some.

    new: of transformers 5; old: of transformers 4, which may be added by hand to a `new` without scaling;
    outer: parameter -> the key of `raw` that may hold it.  Raises CheckpointError where two places differ.
    """
    first, second = _by_kind(new, aliases), _by_kind(old, aliases)
    if second and first.get("rope_type") == "default":
        del first["rope_type"]
    where = (old if second and "rope_type" not in first else new).where
    if second and "rope_type" in first:
        for name in sorted((first.keys() | second.keys()) - outer.keys()):
            _agree({name: first.get(name)}, name, second.get(name), old.where, new.where)
    places = dict.fromkeys(second, old.where)
    for name, key in outer.items():
        if raw.has(key):
            _agree(second, name, raw.get(key), f"{raw.where}: {key}", old.where)
            places[name] = f"{raw.where}: {key}"
    for name, value in second.items():
        _agree(first, name, value, places[name], new.where)
    return RawConfig(first, where)


def _agree(values: dict[str, Any], name: str, value: Any, place: str, other: str) -> None:
    """Set `name`; CheckpointError where it is something else in `values`, which stand in `other`."""
    if values.setdefault(name, value) != value:
        raise CheckpointError(
            f"{other}: {printable(name)} = {shown(values[name])}, and {place} has {shown(value)}; "
            "leave one of them"
        )


def _by_kind(params: RawConfig, aliases: Aliases) -> dict[str, Any]:
    """What is set in `params`, with the kind under `rope_type` alone, by its own name."""
    values = {key: value for key, value in params.values.items() if value is not None}
    kinds = [_kind(params, key, aliases) for key in ("rope_type", "type") if key in values]
    if len(set(kinds)) > 1:
        params.wrong("type", f"{values['rope_type']!r} as rope_type is, or missing")
    values.pop("type", None)
    return values | ({"rope_type": kinds[0]} if kinds else {})


def _kind(params: RawConfig, key: str, aliases: Aliases) -> RopeKind:
    name = params.text(key)
    kind = (aliases or KINDS).get(name, KINDS.get(name))
    if kind is None:
        raise CheckpointError(
            f"{params.where}: rope type {name!r} is not supported; supported: {', '.join(KINDS)}"
        )
    return kind


def build_rope(
    raw: RawConfig,
    params: RawConfig,
    head_dim: int,
    max_position: int,
    partial: bool = False,
) -> tuple[Rope, int]:
    """As `read_rope`, from the rotary parameters `params` (see `merged`) of the configuration `raw`."""
    kind = params.get("rope_type", "default")
    share = params.number("partial_rotary_factor", default=1.0, high=1.0)
    if share != 1.0 and not partial and kind != "proportional":
        params.wrong("partial_rotary_factor", "1 or missing in this family")
    dim = head_dim if kind == "proportional" else int(head_dim * share)
    if dim < 2 or dim % 2:
        raise CheckpointError(
            f"{raw.where}: head_dim {head_dim} gives {dim} rotary channels, they must be even and at least 2"
        )
    rope = Rope(params.number("rope_theta", default=10000.0), dim)
    if kind == "linear" or kind == "dynamic":
        rope = replace(rope, kind=kind, factor=params.number("factor"))
    elif kind == "llama3":
        rope = _read_llama3(rope, params, _original_len(raw, params, max_position))
    elif kind == "yarn":
        rope = _read_yarn(rope, params, _original_len(raw, params, max_position), max_position)
        max_position = max(max_position, min(MAX_POSITION, int(rope.factor * rope.original_max_len)))
    elif kind == "longrope":
        rope = _read_longrope(rope, params, _original_len(raw, params, max_position), max_position)
    elif kind == "proportional":
        factor = params.number("factor", default=1.0)
        rope = replace(rope, kind=kind, factor=factor, turning=int(share * head_dim // 2))
    refuse_unread(params, f"a rotary embedding of the type {kind!r}", ROPE_HARMLESS, ROPE_NEUTRAL)
    return rope, max_position


def _original_len(raw: RawConfig, params: RawConfig, max_position: int) -> int:
    """The context of pre-training; the outer key wins over the inner one, as in transformers."""
    key = "original_max_position_embeddings"
    return (raw if raw.has(key) else params).integer(key, MAX_POSITION, default=max_position, least=2)


def _read_llama3(rope: Rope, params: RawConfig, original: int) -> Rope:
    low, high = params.number("low_freq_factor"), params.number("high_freq_factor")
    if high <= low:
        params.wrong("high_freq_factor", f"above low_freq_factor = {low:g}")
    return replace(
        rope,
        kind="llama3",
        factor=params.number("factor"),
        original_max_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(rope: Rope, params: RawConfig, original: int, max_position: int) -> Rope:
    if rope.theta <= 1.0:
        params.wrong("rope_theta", "above 1 for YaRN")
    factor = params.number("factor", default=max_position / original)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    inferred = mscale(1.0)
    weights = [0.0 if params.zero(k) else params.number(k, default=0.0) for k in ("mscale", "mscale_all_dim")]
    if all(weights):  # 0 is as good as none
        inferred = mscale(weights[0]) / mscale(weights[1])
    return replace(
        rope,
        kind="yarn",
        factor=factor,
        original_max_len=original,
        attention_factor=params.number("attention_factor", default=inferred),
        beta_fast=32.0 if params.zero("beta_fast") else params.number("beta_fast", default=32.0),
        beta_slow=1.0 if params.zero("beta_slow") else params.number("beta_slow", default=1.0),
        truncate=params.flag("truncate", True),
    )


def _read_longrope(rope: Rope, params: RawConfig, original: int, max_position: int) -> Rope:
    factor = params.number("factor", default=max_position / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        rope,
        kind="longrope",
        factor=factor,
        original_max_len=min(original, max_position),
        attention_factor=params.number("attention_factor", default=inferred),
        short_factors=params.numbers("short_factor", rope.dim // 2),
        long_factors=params.numbers("long_factor", rope.dim // 2),
    )


def inverse_frequencies(rope: Rope, max_len: int) -> Tensor:
    """The angle per position of each rotated pair, [dim / 2] fp32, for sequences of up to `max_len` tokens.

    "dynamic" changes nothing up to the trained context, where this engine stops.  "longrope" has two sets:
    one cache holds keys of one set, so `max_len` decides for all positions, the long set beyond the trained
    context.
    """
    exponent = torch.arange(0, rope.dim, 2).float() / rope.dim
    inv = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return inv / rope.factor
    if rope.kind == "proportional":
        # The channels that do not turn are pairs of angle 0 behind those that do.
        return torch.cat((inv[: rope.turning], torch.zeros(len(inv) - rope.turning))) / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv)
    if rope.kind == "yarn":
        return _yarn(rope, exponent)
    if rope.kind == "longrope":
        factors = rope.short_factors if max_len <= rope.original_max_len else rope.long_factors
        return 1.0 / (torch.tensor(factors) * rope.theta**exponent)
    return inv


def _llama3(rope: Rope, inv: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_len * inv / (2 * math.pi)  # rotations within the trained context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv / rope.factor + kept * inv


def _yarn(rope: Rope, exponent: Tensor) -> Tensor:
    """Channels above `beta_fast` turns are kept, those below `beta_slow` stretched, with a ramp between."""

    def channel(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(rope.dim // 2).float() - low) / (high - low)).clamp(0.0, 1.0)
    wave = rope.theta**exponent
    return 1.0 / (rope.factor * wave) * (1 - kept) + 1.0 / wave * kept


def rope_tables(rope: Rope, max_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..max_len - 1, [max_len, dim / 2] fp32 each, scaled."""
    positions = torch.arange(max_len, device=device).float()
    angles = positions[:, None] * inverse_frequencies(rope, max_len).to(device)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
