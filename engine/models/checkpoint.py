"""The safetensors files of a checkpoint directory as untrusted input: which tensors there are, and where.

The format: the header's length in 8 bytes, little-endian; a JSON header of name -> {dtype, shape,
data_offsets}; the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from nudging.errors import CheckpointError
from nudging.files.lfs import refuse_pointer
from nudging.models.json_config import REMEDY, RawConfig, parse_json, printable, read_json

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: its file, its dtype by the format's name, its shape, its size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def list_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name; where there is an index, those that it names and where it says.

    Raises CheckpointError: no safetensors, a damaged index or header, a missing shard, a tensor that is not
    where the index says.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise _no_weights(directory)
    weight_map = _read_index(directory)
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{directory / INDEX} places {printable(name)} in {printable(file)}, which does not have it; "
                f"{REMEDY}"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def describe(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, TensorInfo]:
    """The same of a checkpoint whose tensors are in memory, for messages at home in `directory`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: TensorInfo(directory, names.get(t.dtype, str(t.dtype)), tuple(t.shape), t.nbytes)
        for name, t in tensors.items()
    }


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        return CheckpointError(
            f"{directory} has {', '.join(map(printable, pickles[:3]))} but no {SINGLE}: only "
            "safetensors are read, as other formats can run code; convert it where you trust it, with "
            "transformers' save_pretrained"
        )
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    if shards:
        return CheckpointError(
            f"{directory} has {', '.join(map(printable, shards[:3]))} but neither {SINGLE} nor {INDEX}, "
            "which says what is where; fetch it, too"
        )
    return CheckpointError(
        f"{directory} has neither {SINGLE} nor {INDEX}; give a complete checkpoint directory"
    )


def _read_index(directory: Path) -> dict[str, str]:
    """The index's weight_map, with every shard there."""
    index = read_json(directory / INDEX)
    weight_map = index.part("weight_map")
    if not 1 <= len(weight_map.values) <= MAX_TENSORS:
        index.wrong("weight_map", f"an object of 1 to {MAX_TENSORS} tensors")
    for name, file in weight_map.values.items():
        if not _is_inside(file):
            weight_map.wrong(name, "a .safetensors file of this directory or of a folder in it")
    missing = sorted({f for f in weight_map.values.values() if not (directory / f).exists()})
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(set(weight_map.values.values()))} shards are missing: "
            f"{', '.join(map(printable, missing[:5]))}; fetch the checkpoint again"
        )
    return dict(weight_map.values)


def _is_inside(file: object) -> TypeGuard[str]:
    """Whether it names a shard beside its index or below it; anything else could point anywhere."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or "\\" in file:
        return False
    parts = file.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not Path(file).is_absolute()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.  Raises CheckpointError unless all of its header is right."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            refuse_pointer(prefix + file.read(64), path)
            file.seek(8)
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} has {size} bytes, too few for its header of {length}: it is truncated or no "
                    f"safetensors file; {REMEDY}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {length} bytes, the limit is {MAX_HEADER_BYTES}; {REMEDY}"
                )
            header = parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error
    header.values.pop("__metadata__", None)
    if not 1 <= len(header.values) <= MAX_TENSORS:
        raise CheckpointError(
            f"{path} has {len(header.values)} tensors, the limits are 1 and {MAX_TENSORS}; {REMEDY}"
        )
    spans = sorted(_read_entry(header, name) for name in header.values)
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise CheckpointError(f"{path}: {printable(name)} begins at byte {begin}, not {end}; {REMEDY}")
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path} has {size - 8 - length} bytes of data, its header needs {end}: it is truncated or "
            f"damaged; {REMEDY}"
        )
    return {name: _info(path, header.values[name], stop - begin) for begin, stop, name in spans}


def _read_entry(header: RawConfig, name: str) -> tuple[int, int, str]:
    """Begin and end of a tensor's bytes, its entry being right."""
    entry = header.part(name)
    if entry.text("dtype") not in ITEM_BYTES:
        entry.wrong("dtype", f"one of {', '.join(ITEM_BYTES)}")
    shape, offsets = entry.values.get("shape"), entry.values.get("data_offsets")
    if not _are_sizes(shape) or len(shape) > 8:
        entry.wrong("shape", "a list of at most 8 integers of 0 or more")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        entry.wrong("data_offsets", "a begin and an end")
    need = math.prod(shape) * ITEM_BYTES[entry.values["dtype"]]
    if offsets[1] - offsets[0] != need:
        entry.wrong("data_offsets", f"{need} bytes apart, as its dtype and shape need")
    return offsets[0], offsets[1], name


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 50 for v in value
    )


def _info(path: Path, entry: dict[str, Any], num_bytes: int) -> TensorInfo:
    return TensorInfo(path, entry["dtype"], tuple(entry["shape"]), num_bytes)
