"""Function-preserving inflation: a small trained checkpoint in the body of a large one.

The result costs what a model of the target's shape costs and writes the small model's text, so that agreement
and nudge rates at any size are those of a trained pair, without downloads.  What the small model does not
fill is noise of about 1e-12: without effect, and never zero, which hardware may treat better than weights.

    python -m benchmarks.inflate pocket:base OUT --shape 100m

The source has Llama's layout: no biases, rotary embedding without scaling.  What is changed, and why the
function is not:

* A norm over D channels of which only d carry something finds a mean square smaller by d/D: its weights are
  scaled by sqrt(d/D) and its eps by d/D.
* Rotary pair i of a head of hd channels turns with theta^(-2i/hd), as pair i * HD/hd of a head of HD does:
  pairs are spread by HD/hd, and queries scaled by sqrt(HD/hd) against attention's 1/sqrt(HD).
* Query heads stay with their key: where a target's group is narrower, the key and value head is repeated.
* Added vocabulary: one channel of every embedding holds a tiny constant, which the head's added rows read
  with a huge negative weight.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nudging import LoadedModel
from nudging.api.loading import read_dtype, resolve
from nudging.errors import BadRequest

NOISE = 1e-12
CONSTANT = 2.0**-10  # of the embedding's own root mean square: a norm does not see it
PUSH = -(2.0**30)
SHARD_BYTES = 2 << 30
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TEXT_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json",
              "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


def shape(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int = 32000, tied: bool = True
) -> dict[str, Any]:
    """The config.json of a Llama of this shape."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# Shapes by name; those of published models have their names, less 64 of the largest vocabularies.
SHAPES: dict[str, dict[str, Any]] = {
    "10m": shape(192, 4, 6, 2, 1536),
    "100m": shape(768, 12, 12, 4, 2048),
    "qwen2.5-0.5b": shape(896, 24, 14, 2, 4864, 128000) | {"model_type": "qwen2"},
    "qwen2.5-7b": shape(3584, 28, 28, 4, 18944, 128000, tied=False) | {"model_type": "qwen2"},
    "llama-3.2-1b": shape(2048, 16, 32, 8, 8192, 128000),
    "llama-3.1-8b": shape(4096, 32, 32, 8, 14336, 128000, tied=False),
}

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Layout:
    """The sizes that name every tensor's shape."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    has_biases: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layout:
        """Read a config.json.  Raises BadRequest for a model type that cannot be inflated to."""
        kind = config["model_type"]
        if kind not in MODEL_TYPES:
            raise BadRequest(
                f"model_type is {kind!r}; inflation knows {', '.join(MODEL_TYPES)}: norms of queries, keys "
                "or a block's output would change a Llama's values; give that shape as a llama"
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            hidden,
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["intermediate_size"],
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
            kind == "qwen2" or (kind == "llama" and bool(config.get("attention_bias"))),
        )

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Part:
    """Source rows `from_rows` go to `rows` and all its columns to `cols`, times `scale`.  All int64 [n]."""

    rows: Tensor
    from_rows: Tensor
    cols: Tensor
    scale: float = 1.0


def inflate(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    target: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint (tensors by name, config.json) in the shape of `target`, a config.json.

    Raises BadRequest where the source does not fit into the target.
    """
    new_config = inflate_config(config, target, dtype)
    tensors = inflate_tensors(state.__getitem__, config, target, dtype, device, seed)
    return dict(tensors), new_config


def inflate_config(
    config: Mapping[str, Any], target: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The inflated model's config.json: the target's sizes, the source's rotation and special tokens."""
    source, wanted = Layout.of(config), Layout.of(target)
    check_fits(source, wanted, config)
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act")
    position = target.get("max_position_embeddings") or config["max_position_embeddings"]
    return {
        "architectures": [MODEL_TYPES[target["model_type"]]],
        "model_type": target["model_type"],
        "hidden_size": wanted.hidden,
        "num_hidden_layers": wanted.layers,
        "num_attention_heads": wanted.heads,
        "num_key_value_heads": wanted.kv_heads,
        "head_dim": wanted.head_dim,
        "intermediate_size": wanted.inner,
        "vocab_size": wanted.vocab,
        "tie_word_embeddings": wanted.tied,
        "attention_bias": wanted.has_biases,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_position_embeddings": position,
        "rope_theta": rope_theta(config),
        "rms_norm_eps": config["rms_norm_eps"] * source.hidden / wanted.hidden,
        **{key: config[key] for key in kept if key in config},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def check_fits(source: Layout, target: Layout, config: Mapping[str, Any]) -> None:
    """Raise BadRequest where the source cannot be preserved in the target."""
    for name in ("hidden", "layers", "inner", "vocab", "head_dim"):
        have, room = getattr(source, name), getattr(target, name)
        if have > room:
            raise BadRequest(f"the target's {name} is {room} and the source's {have}; it can only grow")
    if target.head_dim % source.head_dim:
        raise BadRequest(
            f"the target's head_dim is {target.head_dim}; it must be a multiple of {source.head_dim}, or the "
            "rotary frequencies do not meet"
        )
    needed = source.kv_heads * repeats(source, target)
    if needed > target.kv_heads:
        raise BadRequest(
            f"the target has {target.kv_heads} key heads of {target.group} query heads each; "
            f"the source's heads need {needed}"
        )
    if target.vocab > source.vocab and target.hidden == source.hidden:
        raise BadRequest(f"a larger vocabulary needs a free channel; raise hidden_size above {target.hidden}")
    if target.tied and not source.tied:
        raise BadRequest("the source's head is not its embedding; set tie_word_embeddings to false")
    if source.has_biases or config.get("mlp_bias"):
        raise BadRequest("the source has biases; inflation starts from a Llama without")
    if config.get("rope_scaling") or rope_kind(config) != "default":
        raise BadRequest("the source scales its rotary embedding; inflation needs plain frequencies")


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies, in the old or the new form of config.json."""
    return float((config.get("rope_parameters") or config).get("rope_theta", 10000.0))


def rope_kind(config: Mapping[str, Any]) -> str:
    return str((config.get("rope_parameters") or {}).get("rope_type", "default"))


def repeats(source: Layout, target: Layout) -> int:
    """How many key heads of the target hold one of the source, where a target's group is narrower."""
    return -(-source.group // target.group)


def inflate_tensors(
    read: Read,
    config: Mapping[str, Any],
    target: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """The inflated tensors one after the other, each made on `device`; `read(name)` is the source's.

    The noise is that of `seed` and of the kind of device.  Raises BadRequest as `inflate` does.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise BadRequest(f"dtype is {dtype}; it must be float32 or bfloat16, others cannot hold {NOISE:g}")
    old, new = Layout.of(config), Layout.of(target)
    check_fits(old, new, config)
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return (NOISE * torch.randn(size, generator=generator, device=device)).to(dtype)

    def matrix(name: str, size: tuple[int, int], part: Part | None) -> tuple[str, Tensor]:
        out = noise(*size)
        if part is not None:
            values = read(name)[part.from_rows].float() * part.scale
            rows, cols = part.rows.to(device), part.cols.to(device)
            out[rows[:, None], cols] = values.to(device, dtype)
        return name, out

    def norm(name: str, exists: bool) -> tuple[str, Tensor]:
        shrink = math.sqrt(old.hidden / new.hidden)
        out = torch.full((new.hidden,), shrink, device=device)
        if exists:
            out[: old.hidden] = read(name).to(device).float() * shrink
        return name, out.to(dtype)

    yield from vocabulary_tensors(read, old, new, matrix, noise)
    yield norm("model.norm.weight", True)
    for i in range(new.layers):
        prefix, exists = f"model.layers.{i}.", i < old.layers
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield norm(f"{prefix}{name}.weight", exists)
        for name, (size, part) in layer_parts(old, new).items():
            yield matrix(f"{prefix}{name}.weight", size, part if exists else None)
        if new.has_biases:
            for name, rows in (("q", new.heads), ("k", new.kv_heads), ("v", new.kv_heads)):
                yield f"{prefix}self_attn.{name}_proj.bias", noise(rows * new.head_dim)
            if target["model_type"] == "llama":
                yield f"{prefix}self_attn.o_proj.bias", noise(new.hidden)


def vocabulary_tensors(
    read: Read,
    old: Layout,
    new: Layout,
    matrix: Callable[[str, tuple[int, int], Part | None], tuple[str, Tensor]],
    noise: Callable[[int], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Embedding and head; the channel behind the source's last is the constant one."""
    ids = torch.arange(old.vocab)
    part = Part(ids, ids, torch.arange(old.hidden))
    size, constant = (new.vocab, new.hidden), old.hidden
    name, embed = matrix("model.embed_tokens.weight", size, part)
    if new.vocab > old.vocab:
        # A tied head reads the constant with the known rows, too: the same for all of them, softmax drops it.
        embed[: old.vocab, constant] = CONSTANT * float(read(name).float().square().mean().sqrt())
        if new.tied:
            embed[old.vocab :, constant] = PUSH
    yield name, embed
    if new.tied:
        return
    source_name = "model.embed_tokens.weight" if old.tied else "lm_head.weight"
    _, head = matrix(source_name, size, part)
    if new.vocab > old.vocab:
        head[old.vocab :, constant] = PUSH
    yield "lm_head.weight", head


def layer_parts(old: Layout, new: Layout) -> dict[str, tuple[tuple[int, int], Part]]:
    """The matrices of a layer: name, the target's size and where the source's values go."""
    hidden, inner = torch.arange(old.hidden), torch.arange(old.inner)
    times, spread = repeats(old, new), new.head_dim // old.head_dim
    half = torch.arange(old.head_dim // 2) * spread
    dims = torch.cat([half, half + new.head_dim // 2])

    def heads(places: list[int]) -> Tensor:
        return torch.cat([place * new.head_dim + dims for place in places])

    groups = [divmod(head, old.group) for head in range(old.heads)]
    q_places = [(g * times + j // new.group) * new.group + j % new.group for g, j in groups]
    q_rows, kv_rows = heads(q_places), heads(list(range(old.kv_heads * times)))
    every_q = torch.arange(old.heads * old.head_dim)
    every_kv = torch.arange(old.kv_heads * old.head_dim).view(old.kv_heads, old.head_dim)
    every_kv = every_kv.repeat_interleave(times, 0).flatten()
    q_size, kv_size = new.heads * new.head_dim, new.kv_heads * new.head_dim
    into = (new.inner, new.hidden)
    return {
        "self_attn.q_proj": ((q_size, new.hidden), Part(q_rows, every_q, hidden, math.sqrt(spread))),
        "self_attn.k_proj": ((kv_size, new.hidden), Part(kv_rows, every_kv, hidden)),
        "self_attn.v_proj": ((kv_size, new.hidden), Part(kv_rows, every_kv, hidden)),
        "self_attn.o_proj": ((new.hidden, q_size), Part(hidden, hidden, q_rows)),
        "mlp.gate_proj": (into, Part(inner, inner, hidden)),
        "mlp.up_proj": (into, Part(inner, inner, hidden)),
        "mlp.down_proj": ((new.hidden, new.inner), Part(hidden, hidden, inner)),
    }


def inflate_checkpoint(
    source: Path,
    out: Path,
    target: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint in `source`, inflated to `target`, to `out`, with its tokenizer beside it.

    At most one shard of `shard_bytes` is held in memory.  Raises BadRequest as `inflate` does.
    """
    config = write_json_files(source, out, target, dtype)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        tensors = inflate_tensors(file.get_tensor, config, target, dtype, device, seed)
        write_shards(tensors, out, shard_bytes)


def inflate_model(
    source: Path,
    folder: Path,
    target: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LoadedModel:
    """The model of that checkpoint without writing it: `folder` gets what is not a weight.

    While it is made, its weights are on the device twice.  Raises BadRequest as `inflate` does.
    """
    config = write_json_files(source, folder, target, dtype)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        tensors = dict(inflate_tensors(file.get_tensor, config, target, dtype, device, seed))
    return LoadedModel.load(folder, device=str(device), tensors=tensors)


def write_json_files(
    source: Path, out: Path, target: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The inflated config.json and the tokenizer's files, in `out`; the source's config."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    new_config = inflate_config(config, target, dtype)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(new_config, indent=2) + "\n")
    for name in TEXT_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    return config


def write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path, shard_bytes: int) -> None:
    """Safetensors files of about `shard_bytes`, and the index that says what is where."""
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.cpu()
        total += tensor.nbytes
        if sum(t.nbytes for t in shard.values()) >= shard_bytes:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", "name", type=click.Choice(list(SHAPES)), help="A shape by its name.")
@click.option("--config", type=click.Path(exists=True, path_type=Path), help="Or a config.json.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the tensors are made.")
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
def main(
    source: str, out: Path, name: str | None, config: Path | None, dtype: str, device: str, seed: int
) -> None:
    """Write SOURCE (a Llama's directory or pocket:NAME) to OUT in a larger shape."""
    if (name is None) == (config is None):
        raise click.UsageError("give one of --shape and --config")
    target = SHAPES[name] if name is not None else json.loads(config.read_text()) if config else {}
    wanted = read_dtype(dtype)
    assert isinstance(wanted, torch.dtype)
    try:
        inflate_checkpoint(resolve(source), out, target, wanted, device, seed)
    except BadRequest as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
