"""From a checkpoint directory to a `Decoder`: safetensors only, every tensor checked, nothing executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nudging.errors import BadRequest, CheckpointError
from nudging.kernels.weight import Int8Weight, PackedWeight, Weight, pack, quantize_int8, whole_panels
from nudging.models.checkpoint import DTYPES, TensorInfo, describe, list_tensors
from nudging.models.cpu_forward import runs_in_cpp
from nudging.models.decoder import Decoder
from nudging.models.json_config import REMEDY
from nudging.models.model_config import ModelConfig
from nudging.models.registry import FAMILIES, read_config
from nudging.models.tensors import Slot, plan
from nudging.models.weights import Arena, Layer, Weights, arena_size

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The fields of a layer that matrix products read.
MATRICES = ("qkv", "o", "gate_up", "down")
Quantization = Literal["int8"] | None


def load_model(
    path: str | Path,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    progress: bool = False,
    max_len: int | None = None,
    quantization: Quantization = None,
    tensors: Mapping[str, Tensor] | None = None,
    packed: bool = True,
) -> Decoder:
    """The decoder of the checkpoint in directory `path`.

    dtype "auto" is the checkpoint's own; quantization "int8" quantises the weights of all matrix products
    (norms, biases and looked-up embeddings keep the dtype); max_len as in `read_config`; progress draws a bar
    on stderr; tensors: the checkpoint's by name, on any device, where they are in memory and the directory
    has none; packed: False leaves the weights in the order of the checkpoint where C++ would rather have
    them in its own.  Raises CheckpointError for anything missing, unexpected, damaged, misshapen or not
    finite, BadRequest for an unsupported dtype or a max_len out of range.
    """
    directory = Path(path)
    config = read_config(directory, max_len)
    family = FAMILIES[config.family]
    infos = list_tensors(directory) if tensors is None else describe(tensors, directory)
    found = plan(directory, config, family, infos)
    top, layers = found.top, found.layers
    chosen = _choose_dtype(dtype, config, infos[top["embed"].names[0]])
    num_bytes = sum(infos[name].num_bytes for slot in found.slots for name in slot.names)
    with ExitStack() as stack:
        advance = stack.enter_context(_progress_bar(directory.name, num_bytes, progress))
        packs = packed and runs_in_cpp(chosen, torch.device(device))
        arena = Arena(arena_size(_parts(top, layers, chosen, quantization, packs)), torch.device(device))
        get = _opened(infos, stack) if tensors is None else tensors.__getitem__
        read = _Reader(infos, get, chosen, arena, advance, packs)
        matrix: Callable[[Slot], Weight] = read.matrix if quantization is None else read.int8
        if config.tied:
            embed, head = _tied(top["embed"], found.tied_head, read, quantization)
        else:
            embed, head = read(top["embed"]), matrix(top["head"])
        built = tuple(_read_layer(layer, matrix, read) for layer in layers)
        norm = read(top["norm"]) if "norm" in top else None
    return Decoder(config, Weights(embed, built, norm, head))


def _read_layer(
    slots: dict[str, Slot], matrix: Callable[[Slot], Weight], vector: Callable[[Slot], Tensor]
) -> Layer:
    qkv, o, gate_up, down = (matrix(slots[field]) for field in MATRICES)
    vectors = {field: vector(slot) for field, slot in slots.items() if field not in MATRICES}
    return Layer(qkv, o, gate_up, down, **vectors)


def _parts(
    top: dict[str, Slot],
    layers: list[dict[str, Slot]],
    dtype: torch.dtype,
    quantization: Quantization,
    packs: bool,
) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that the weights will be."""
    slots = [*top.items(), *(item for layer in layers for item in layer.items())]
    is_tied = "head" not in top
    if quantization is not None and is_tied:
        slots.append(("head", top["embed"]))
    for field, slot in slots:
        is_matrix = field in (*MATRICES, "head") or (field == "embed" and is_tied)
        shape = _held(slot.shape) if is_matrix and packs else slot.shape
        if quantization is not None and field in (*MATRICES, "head"):
            yield shape, torch.int8
            yield slot.shape[:1], torch.float32
        else:
            yield shape, dtype


def _held(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With room for what fills up the last panel."""
    return (whole_panels(shape[0]), *shape[1:])


def _choose_dtype(
    dtype: torch.dtype | Literal["auto"], config: ModelConfig, embed: TensorInfo
) -> torch.dtype:
    if dtype == "auto":
        return DTYPE_NAMES.get(config.dtype or "", DTYPES[embed.dtype])
    if dtype not in DTYPE_NAMES.values():
        raise BadRequest(f"dtype {dtype!r} is not supported; take 'auto' or one of {', '.join(DTYPE_NAMES)}")
    return dtype


class _TensorFile(Protocol):
    def get_tensor(self, name: str) -> Tensor: ...


class _Reader:
    """Reads slots into an arena in the wanted dtype; `get` gives the tensor of a name."""

    def __init__(
        self,
        tensors: dict[str, TensorInfo],
        get: Callable[[str], Tensor],
        dtype: torch.dtype,
        arena: Arena,
        advance: Callable[[int], None],
        packs: bool,
    ) -> None:
        """`packs`: whether matrices are packed."""
        self.tensors = tensors
        self.get = get
        self.dtype = dtype
        self.arena = arena
        self.advance = advance
        self.packs = packs

    def __call__(self, slot: Slot) -> Tensor:
        """The slot's tensors joined along dim 0.  Raises CheckpointError when a value is not finite."""
        return self.read(slot, self.arena.empty(slot.shape, self.dtype))

    def matrix(self, slot: Slot) -> Tensor | PackedWeight:
        """The same, as products read it best."""
        held = self.room(slot.shape, self.dtype)
        self.read(slot, held[: slot.shape[0]])
        return self.packed(held, slot.shape[0])

    def int8(self, slot: Slot) -> Weight:
        """The same, quantised."""
        return self.quantize(self.read(slot, torch.empty(slot.shape, dtype=self.dtype)))

    def quantize(self, weight: Tensor) -> Weight:
        """An int8 copy of `weight` in the arena."""
        exact, out = quantize_int8(weight), len(weight)
        values = self.room(tuple(weight.shape), torch.int8)
        scales = self.arena.empty((out,), torch.float32)
        values[:out].copy_(exact.values)
        scales.copy_(exact.scales)
        return pack(values, out, scales) if self.packs else Int8Weight(values, scales)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where a matrix of that shape goes; longer where it will be packed."""
        return self.arena.empty(_held(shape) if self.packs else shape, dtype)

    def packed(self, held: Tensor, out: int) -> Tensor | PackedWeight:
        """The matrix in `room`, packed where it is to be."""
        return pack(held, out) if self.packs else held

    def read(self, slot: Slot, out: Tensor) -> Tensor:
        """`out`, filled."""
        begin = 0
        for name, shape in zip(slot.names, slot.shapes, strict=True):
            part = out[begin : begin + shape[0]]
            begin += shape[0]
            info = self.tensors[name]
            part.copy_(self.get(name))
            # One pass that allocates nothing: a finite sum has no NaN or Inf among its terms.
            if not part.sum(dtype=torch.float32).isfinite() and not part.isfinite().all():
                bad = int((~part.isfinite()).sum())
                raise CheckpointError(
                    f"{info.file}: {name} has {bad} values that are NaN or infinite in {self.dtype}; "
                    "fetch the checkpoint again, or load it in a wider dtype"
                )
            self.advance(info.num_bytes)
        return out


def _opened(tensors: dict[str, TensorInfo], stack: ExitStack) -> Callable[[str], Tensor]:
    """What reads a tensor from its file by its name, while `stack` is open."""
    files = {file: _open(file, stack) for file in {info.file for info in tensors.values()}}
    return lambda name: files[tensors[name].file].get_tensor(name)


def _open(file: Path, stack: ExitStack) -> _TensorFile:
    try:
        handle: _TensorFile = stack.enter_context(safe_open(file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; {REMEDY}") from error
    return handle


def _tied(
    slot: Slot, given: Slot | None, read: _Reader, quantization: Quantization
) -> tuple[Tensor | PackedWeight, Weight]:
    """Embedding and head, which are one; an int8 head is a copy: embeddings are looked up as they were.

    A head that is `given` all the same has to be the embedding.
    """
    held = read.room(slot.shape, read.dtype)
    rows = read.read(slot, held[: slot.shape[0]])
    if given is not None and not torch.equal(read.read(given, torch.empty_like(rows)), rows):
        raise CheckpointError(
            f"{read.tensors[given.names[0]].file}: {given.names[0]} is not the embedding although "
            "config.json has tie_word_embeddings true; set it to false if the head was trained"
        )
    if quantization is not None:
        return rows, read.quantize(rows)
    both = read.packed(held, slot.shape[0])
    return both, both


@contextmanager
def _progress_bar(name: str, num_bytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that advances the bar by some bytes; one that does nothing when the bar is not shown."""
    if not shown:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"loading {name}", total=num_bytes)
        yield lambda advance: bar.advance(task, advance)
