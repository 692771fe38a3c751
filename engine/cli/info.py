"""`nudging info`: versions, devices, the shipped models, and what a checkpoint is."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nudging.cli.options import option

if TYPE_CHECKING:
    from nudging.models.checkpoint import TensorInfo
    from nudging.models.model_config import ModelConfig

Facts = list[tuple[str, str]]


@click.command()
@option("--base", metavar="CHECKPOINT", help="Describe this one: a directory, a hub id or pocket:NAME.")
def info(base: str | None) -> None:
    """Versions, device and shipped models, or a checkpoint.

    With --base, what that checkpoint is: family, size, context, tokenizer; no weights are read.
    """
    print_facts(system_facts() + pocket_facts() if base is None else checkpoint_facts(base))


def print_facts(facts: Facts) -> None:
    """One a line, names first."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {value}")


def system_facts() -> Facts:
    """What a report of a problem should begin with."""
    import torch

    packages = [
        (name, installed(name))
        for name in (
            "nudging",
            "torch",
            "triton",
            "tokenizers",
            "sentencepiece",
            "flash-attn",
            "flash-attn-3",
        )
    ]
    facts = [*packages[:1], ("python", platform.python_version()), *packages[1:]]
    facts.append(("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"))
    facts.append(("cpu kernels", cpu_isas()))
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = size(gpu.total_memory)
        facts.append((f"cuda:{i}", f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"))
        facts.append((f"tiles of cuda:{i}", gpu_tiles(i)))
    facts.append(("device auto", "cuda" if torch.cuda.is_available() else "cpu"))
    return facts


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_isas() -> str:
    """The instruction sets the C++ kernels can use here, the best first."""
    from nudging import _C

    return ", ".join(isa.name for isa in _C.available_isas())


def gpu_tiles(index: int) -> str:
    """Whose tiles, warps and stages the kernels take there."""
    import torch

    from nudging.kernels.gpu.common.configs import TABLE, capability

    found = capability(torch.device("cuda", index))
    if found is None or found not in TABLE:
        return f"the default ones; the table has {', '.join(f'{a}.{b}' for a, b in TABLE)}"
    return f"those of compute capability {found[0]}.{found[1]}"


def pocket_facts() -> Facts:
    """The shipped checkpoints that are there."""
    from nudging.pocket import CARDS, path

    return [(f"pocket:{name}", summary(path(name))) for name in CARDS if path(name).is_dir()]


def summary(path: Path) -> str:
    """A checkpoint in a line."""
    from nudging.models.checkpoint import list_tensors
    from nudging.models.registry import read_config

    return f"{read_config(path).family}, {weights(list_tensors(path))}"


def weights(tensors: dict[str, TensorInfo]) -> str:
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return f"{count(parameters)} parameters, {size(sum(tensor.num_bytes for tensor in tensors.values()))}"


def checkpoint_facts(name: str) -> Facts:
    """A checkpoint from its headers.  Raises CheckpointError, BadRequest."""
    from nudging.api.loading import resolve
    from nudging.models.checkpoint import list_tensors
    from nudging.models.registry import read_config
    from nudging.text.chat_template import plain_chat_template
    from nudging.text.roles import load_text_side

    path = resolve(name)
    config, tensors = read_config(path), list_tensors(path)
    tokenizer, template = load_text_side(path)
    vocabulary = f"{config.vocab_size} ids"
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        more = tokenizer.vocab_size > config.vocab_size
        vocabulary += f", {'fewer than the' if more else 'of which the tokenizer has'} {tokenizer.vocab_size}"
        vocabulary += " of the tokenizer: texts with the others are refused" if more else ""
    return [
        ("checkpoint", str(path)),
        ("family", config.family),
        ("weights", f"{weights(tensors)} in {', '.join(sorted({t.dtype for t in tensors.values()}))}"),
        ("layers", str(config.num_layers)),
        (
            "heads",
            f"{config.num_heads}, {config.num_kv_heads} of keys and values, {config.head_dim} channels each",
        ),
        ("context", f"{config.max_len} tokens"),
        ("kv cache", kv_cache(config, tensors)),
        ("vocabulary", vocabulary),
        ("tokenizer", "none: prompts are token ids" if tokenizer is None else type(tokenizer).__name__),
        ("chat template", (template or plain_chat_template()).form),
        ("ends with", ", ".join(map(str, config.eos_token_ids)) or "no id"),
    ]


def kv_cache(config: ModelConfig, tensors: dict[str, TensorInfo]) -> str:
    """Bytes of cache for a token in the checkpoint's own dtype, as `--dtype auto` keeps it."""
    from nudging.models.checkpoint import ITEM_BYTES

    stored = next(tensor.dtype for name, tensor in tensors.items() if "embed_tokens" in name)
    item = ITEM_BYTES[
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(config.dtype or "", stored)
    ]
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item
    return f"{per_token} bytes a token, {size(per_token * config.max_len)} for a whole context"


def count(number: int) -> str:
    """12345678 -> "12.3M"."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)


def size(num_bytes: int) -> str:
    """12345678 -> "11.8 MiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"
