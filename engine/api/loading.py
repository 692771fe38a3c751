"""From names to loaded models: checkpoints found, opened once each, and given their share of the cache
memory.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from nudging import _C
from nudging.errors import BadRequest, CheckpointError
from nudging.executor.cuda_graphs import CudaRecorder
from nudging.executor.cycles.overlap import Overlap
from nudging.executor.graph_runner import GraphRunner
from nudging.executor.model_runner import ModelRunner, block_bytes
from nudging.files.hub import download, is_hub_id, read_revisions
from nudging.kernels.flash_attn import FlashAttn
from nudging.models.decoder import Decoder
from nudging.models.loader import Quantization, load_model
from nudging.models.registry import read_config
from nudging.text.chat_template import ChatTemplate, plain_chat_template
from nudging.text.roles import Role, load_text_side
from nudging.text.tokenizer import Tokenizer

UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Their other names.
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
}
MAX_THREADS = 1024
SHOWN_IDS = 5


def resolve(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a checkpoint: `pocket:NAME`, a local directory (never touches the network), or a
    hub id, at a `revision` of its repository.
    """
    text = os.fspath(name)
    if text.startswith("pocket:"):
        from nudging.pocket import path as pocket_path

        return pocket_path(text.removeprefix("pocket:"))
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if not is_hub_id(name):
        raise CheckpointError(
            f"{text!r} is not a directory; give a checkpoint's directory, a hub id or pocket:NAME"
        )
    return download(text, revision)


def read_bytes(value: int | str) -> int:
    """A number of bytes: 2147483648 or "2GiB".  Raises BadRequest."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise BadRequest(
            f"kv_cache_memory is {value!r}; give a positive number of bytes, or one like '512MiB' or '2GiB'"
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def read_device(device: str | torch.device) -> torch.device:
    """A torch device; "auto" is the GPU where there is one.  Raises BadRequest."""
    device = str(device) if isinstance(device, torch.device) else device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = isinstance(device, str) and re.fullmatch(r"cpu|cuda(:\d+)?", device)
    if not named:
        raise BadRequest(f"device is {device!r}; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadRequest(f"device is {device!r} and no CUDA GPU can be used here; use device='cpu'")
    return torch.device(device)


def read_dtype(dtype: str | torch.dtype) -> torch.dtype | Literal["auto"]:
    """A torch dtype or "auto", the checkpoint's own.  Raises BadRequest."""
    if dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise BadRequest(f"dtype is {dtype!r}; it must be 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def read_quantization(quantization: str | None) -> Quantization:
    """None, or "int8".  Raises BadRequest."""
    if quantization is None or quantization == "int8":
        return quantization  # type: ignore[return-value]
    raise BadRequest(f"quantization is {quantization!r}; it must be None or 'int8'")


def read_threads(threads: int | None) -> int:
    """How many threads the CPU ops take, torch's number by default.  Raises BadRequest."""
    if threads is None:
        return torch.get_num_threads()
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS:
        raise BadRequest(f"threads is {threads!r}; it must be an integer from 1 to {MAX_THREADS}")
    return threads


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory, which any number of `LLM`s may be opened on: they share its weights.

    `path`: the checkpoint's directory, where the tokenizer is.
    """

    path: Path
    decoder: Decoder

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        max_len: int | None = None,
        progress: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
        revision: str | None = None,
    ) -> LoadedModel:
        """The model of a checkpoint; the options are those of `LLM`.

        `tensors`: the checkpoint's weights by name, where they were made in memory: then the directory needs
        only its JSON files.  Raises BadRequest and CheckpointError.
        """
        path = resolve(name, read_revisions(revision, {"this": name}).get("this"))
        options = read_dtype(dtype), read_device(device), progress
        quantized = read_quantization(quantization)
        return cls(path, load_model(path, *options, max_len, quantized, tensors))

    def check(
        self,
        dtype: torch.dtype | Literal["auto"],
        device: torch.device,
        max_len: int | None,
        quantization: Quantization,
    ) -> None:
        """Raise BadRequest where an LLM is asked to be what this model is not."""
        have, config = self.decoder, self.decoder.config
        if device.type != have.device.type or device.index not in (None, have.device.index):
            raise BadRequest(f"a loaded model is on {have.device}; give device={str(have.device)!r} for it")
        is_int8 = have.precision.startswith("int8")
        if dtype not in ("auto", have.dtype) or (quantization is not None and not is_int8):
            raise BadRequest(
                f"a loaded model is {have.precision} and dtype={dtype}, quantization={quantization!r} were "
                "asked for; give them to LoadedModel.load and not to LLM"
            )
        if max_len is not None and min(max_len, config.max_position) != config.max_len:
            raise BadRequest(
                f"a loaded model has max_len {config.max_len}, not {max_len}; give it to LoadedModel.load"
            )


# How a caller names a model.
Checkpoint = str | os.PathLike[str] | LoadedModel


def load_roles(
    checkpoints: Mapping[str, Checkpoint],
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    progress: bool,
    max_len: int | None,
    quantization: Quantization = None,
    templates: Mapping[str, str] = MappingProxyType({}),
    revision: str | Mapping[str, str] | None = None,
) -> tuple[dict[str, Role], dict[str, Decoder]]:
    """Every role, and every model by its name; roles of one checkpoint share one model.

    `templates`: the chat templates of roles that do not take their checkpoint's; `revision`: see
    `read_revisions`.  Raises CheckpointError, and BadRequest for a `pocket:` name that does not exist, a
    loaded model that is not as the others shall be and a template that is none.
    """
    revisions = read_revisions(revision, checkpoints)
    sources = {
        role: c if isinstance(c, LoadedModel) else resolve(c, revisions.get(role))
        for role, c in checkpoints.items()
    }
    decoders: dict[str, Decoder] = {}
    roles: dict[str, Role] = {}
    names: dict[Path | LoadedModel, str] = {}
    texts = {role: _text_side(source, templates.get(role)) for role, source in sources.items()}
    for role, source in sources.items():
        if isinstance(source, LoadedModel):
            source.check(dtype, device, max_len, quantization)
            path, name = source.path, names.setdefault(source, role)
            decoders[name] = source.decoder
        else:
            path, name = source, names.setdefault(source.resolve(), role)
        if name not in decoders:
            limit = None if max_len is None else min(max_len, read_config(path).max_position)
            decoders[name] = load_model(path, dtype, device, progress, limit, quantization)
        config = decoders[name].config
        tokenizer, template = texts[role]
        eos = frozenset(config.eos_token_ids)
        if tokenizer is not None:
            _serve(tokenizer, role, config.vocab_size)
            if not eos and tokenizer.eos_id is not None and tokenizer.eos_id < config.vocab_size:
                eos = frozenset((tokenizer.eos_id,))
        roles[role] = Role(role, name, tokenizer, template, eos, config.vocab_size, config.max_len)
    return roles, decoders


def _serve(tokenizer: Tokenizer, role: str, num_rows: int) -> None:
    """Have it read for a model of so many ids; warn of tokens that the model does not have."""
    beyond = tokenizer.serve(num_rows)
    if beyond:
        shown = ", ".join(f"{token} ({tokenizer.shown(token)!r})" for token in beyond[:SHOWN_IDS])
        more = f" and {len(beyond) - SHOWN_IDS} more" if len(beyond) > SHOWN_IDS else ""
        warnings.warn(
            f"the tokenizer of {role!r} knows the ids {shown}{more}, and the model's embedding has "
            f"{num_rows} rows; texts with these tokens are refused",
            stacklevel=2,
        )


def _text_side(source: Path | LoadedModel, given: str | None) -> tuple[Tokenizer | None, ChatTemplate]:
    """Tokenizer and chat template of a checkpoint, the template being the one `given` if any."""
    tokenizer, own = load_text_side(source.path if isinstance(source, LoadedModel) else source)
    template = own or plain_chat_template()
    return tokenizer, template if given is None else template.replaced(given)


def describe_models(
    checkpoints: Mapping[str, Checkpoint], roles: Mapping[str, Role], runners: Mapping[str, ModelRunner]
) -> str:
    """A line that names every role's checkpoint and precision, and the device."""
    models = []
    for name, checkpoint in checkpoints.items():
        path = checkpoint.path if isinstance(checkpoint, LoadedModel) else checkpoint
        models.append(f"{name}={os.fspath(path)!r} ({runners[roles[name].model].precision})")
    return f"{', '.join(models)} on {next(iter(runners.values())).decoder.device}"


def make_runners(
    decoders: dict[str, Decoder],
    roles: dict[str, Role],
    memory: int,
    block_size: int,
    prefix_caching: bool,
    threads: int,
    flash: FlashAttn | None = None,
) -> dict[str, ModelRunner]:
    """Pools from one budget of `memory` bytes, divided so that every role can hold equally many tokens.

    `threads`: of the CPU ops, which all models take turns with; `flash`: what reads prompts, if not our
    kernel.

    Raises BadRequest where not even one block for each role fits, and for more than the device has.
    """
    device = next(iter(decoders.values())).device
    if memory > (most := device_memory(device)):
        raise BadRequest(f"kv_cache_memory is {memory} bytes and {device} has {most}; give less")
    users = {name: sum(role.model == name for role in roles.values()) for name in decoders}
    sizes = {name: block_bytes(decoder, block_size) for name, decoder in decoders.items()}
    rounds = memory // sum(users[name] * sizes[name] for name in decoders)
    if rounds < 2:
        least = 2 * sum(users[name] * sizes[name] for name in decoders)
        raise BadRequest(
            f"kv_cache_memory is {memory} bytes; these models need at least {least} for two blocks each"
        )
    team = _C.Team(threads)
    # One block of each model's budget is no pool's: see KVCache.
    runners = {
        name: make_runner(decoder, rounds * users[name] - 1, block_size, prefix_caching, team, flash)
        for name, decoder in decoders.items()
    }
    foresee(runners, roles)
    return runners


def device_memory(device: torch.device) -> int:
    """All the memory there is, in bytes, used or free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def foresee(
    runners: Mapping[str, ModelRunner],
    roles: Mapping[str, Role],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Let the base and its guide run whole cycles, and each by itself, where their passes are recorded.

    `clock`: the seconds of now, which cycles are timed with.
    """
    writers = [name for name in ("guide", "base") if name in roles]
    for who in dict.fromkeys([tuple(writers), *((name,) for name in writers)]):
        taking = {
            name: runner for name in who if isinstance(runner := runners[roles[name].model], GraphRunner)
        }
        if who and len(taking) == len(who):
            ends = {name: roles[name].eos_ids for name in who}
            vocab = min(roles[name].vocab_size for name in who)
            overlap = Overlap(taking, ends, vocab, taking[who[0]].recorder, clock)
            for runner in set(taking.values()):
                runner.overlaps.append(overlap)


def make_runner(
    decoder: Decoder,
    num_blocks: int,
    block_size: int,
    prefix_caching: bool,
    team: _C.Team,
    flash: FlashAttn | None,
) -> ModelRunner:
    """The runner for the decoder's device: a GPU's passes are recorded and replayed."""
    if decoder.device.type == "cuda":
        return GraphRunner(
            decoder, num_blocks, block_size, CudaRecorder(decoder.device), prefix_caching, flash
        )
    return ModelRunner(decoder, num_blocks, block_size, prefix_caching, team, flash)
