"""Which tensors of a checkpoint become which weights of the decoder: their names and shapes, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nudging.errors import CheckpointError
from nudging.models.checkpoint import DTYPES, TensorInfo
from nudging.models.families.standard import Family
from nudging.models.json_config import REMEDY, printable
from nudging.models.model_config import ModelConfig

SHOWN_NAMES = 5
EMBED = "embed_tokens.weight"
# Of no use to this engine: what older code stored beside the weights, and heads for other ends than text.
LEFTOVERS = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "embeddings.position_ids"),
    *("position_ids", "attn.masked_bias", "self_attn.masked_bias"),
)
# Where the decoder lies besides its family's own places: saved alone, and wrapped once more.
OTHER_PREFIXES = ("", "model.model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
OTHER_HEADS = ("v_head.", "value_head.", "score.", "classifier.", "reward_head.")


class Slot(NamedTuple):
    """One weight of the decoder: the tensors joined along dim 0 into it, with the shape of each."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


class Plan(NamedTuple):
    """Every weight that a checkpoint has, its tensors known to be there and of the right shapes.

    top: the weights of the whole model by name ("embed", "norm", "head"), those missing that it does without;
    layers: those of each layer; tied_head: a head that a tied checkpoint brings all the same.
    """

    top: dict[str, Slot]
    layers: list[dict[str, Slot]]
    tied_head: Slot | None

    @property
    def slots(self) -> list[Slot]:
        """Every weight of the decoder."""
        return [*self.top.values(), *(slot for layer in self.layers for slot in layer.values())]


def plan(directory: Path, config: ModelConfig, family: Family, tensors: Mapping[str, TensorInfo]) -> Plan:
    """Where every weight comes from.  CheckpointError: a tensor is missing, not known or of another shape."""
    prefixes = (*family.prefixes, *OTHER_PREFIXES)
    prefix = next((p for p in prefixes if f"{p}{EMBED}" in tensors), family.prefixes[0])
    found = _slots(config, family, prefix, tensors)
    _check_names(directory, config, family, found, tensors)
    _check_shapes(config, found, tensors)
    return found


def layer_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each weight of a layer: the rows of the tensors joined in it, and the dimensions after the rows."""
    hidden, q, kv, inner = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "qkv": ((q, kv, kv), (hidden,)),
        "o": ((hidden,), (q,)),
        "gate_up": ((inner, inner), (hidden,)),
        "down": ((hidden,), (inner,)),
    }
    if config.norm == "rms" and config.pre_norm:
        shapes |= {"attn_norm": ((hidden,), ()), "mlp_norm": ((hidden,), ())}
    if config.post_norm:
        shapes |= {"attn_post_norm": ((hidden,), ()), "mlp_post_norm": ((hidden,), ())}
    if config.qk_norm == "head":
        shapes |= {"q_norm": ((config.head_dim,), ()), "k_norm": ((config.head_dim,), ())}
    if config.qk_norm == "full":
        shapes |= {"q_norm": ((q,), ()), "k_norm": ((kv,), ())}
    if config.qkv_bias:
        shapes["qkv_bias"] = ((q, kv, kv), ())
    if config.o_bias:
        shapes["o_bias"] = ((hidden,), ())
    if config.mlp_bias:
        shapes |= {"gate_up_bias": ((inner, inner), ()), "down_bias": ((hidden,), ())}
    return shapes


def _slots(config: ModelConfig, family: Family, prefix: str, tensors: Mapping[str, TensorInfo]) -> Plan:
    table = ((config.vocab_size, config.hidden_size),)
    top = {"embed": Slot((f"{prefix}{EMBED}",), table)}
    if config.norm == "rms":
        top["norm"] = Slot((f"{prefix}norm.weight",), ((config.hidden_size,),))
    given = next((name for name in HEADS if name in tensors), None)
    if not config.tied:
        top["head"] = Slot((given or HEADS[0],), table)
    layers = []
    for i in range(config.num_layers):
        slots = {}
        for field, (rows, rest) in layer_shapes(config).items():
            names = tuple(f"{prefix}layers.{i}.{name}" for name in family.tensors[field])
            rows = rows if len(names) == len(rows) else (sum(rows),)  # a checkpoint may come with them joined
            slots[field] = Slot(names, tuple((r, *rest) for r in rows))
        layers.append(slots)
    return Plan(top, layers, Slot((given,), table) if config.tied and given is not None else None)


def _check_names(
    directory: Path, config: ModelConfig, family: Family, found: Plan, tensors: Mapping[str, TensorInfo]
) -> None:
    """Every wanted tensor is there, and no other than those known to be of no use."""
    wanted = [name for slot in found.slots for name in slot.names]
    missing = [name for name in wanted if name not in tensors]
    if missing == [HEADS[0]]:
        raise CheckpointError(
            f"{directory} has no {HEADS[0]}, and tie_word_embeddings is false: the model was saved without "
            "its head; give the whole checkpoint, or set tie_word_embeddings to true in config.json if the "
            "embedding is its head"
        )
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(wanted)} tensors are missing: {_some(missing)}; check that "
            f"config.json (model_type {config.family!r}) is this checkpoint's, and fetch it again"
        )
    known = {*wanted, *(found.tied_head.names if found.tied_head else ())}
    extra = [
        name
        for name in tensors
        if name not in known
        and not name.startswith((*family.ignored, *OTHER_HEADS))
        and not name.endswith(LEFTOVERS)
    ]
    if extra:
        raise CheckpointError(
            f"{directory}: {len(extra)} tensors are not known in a {config.family!r} model: {_some(extra)}; "
            "check that config.json is this checkpoint's"
        )


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(map(printable, names[:SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def _check_shapes(config: ModelConfig, found: Plan, tensors: Mapping[str, TensorInfo]) -> None:
    heads = [] if found.tied_head is None else [found.tied_head]
    for slot in (*found.slots, *heads):
        for name, shape in zip(slot.names, slot.shapes, strict=True):
            info = tensors[name]
            if info.dtype not in DTYPES:
                way = (
                    "save it in float32" if info.dtype == "F64" else "give a checkpoint that is not quantised"
                )
                raise CheckpointError(
                    f"{info.file}: {name} is {info.dtype}, supported are {', '.join(DTYPES)}; {way}"
                )
            if info.shape != shape:
                why = ""
                if slot in heads:
                    why = ", as it is the embedding by tie_word_embeddings = true"
                elif shape[0] == config.vocab_size and info.shape[:1] != shape[:1]:
                    why = f" (config.json's vocab_size is {config.vocab_size})"
                raise CheckpointError(
                    f"{info.file}: {name} has shape {list(info.shape)}, config.json makes it {list(shape)}"
                    f"{why}; {REMEDY}"
                )
