"""A checkpoint's JSON files as untrusted input: bytes become a JSON object, or an error names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nudging.errors import CheckpointError
from nudging.files.lfs import refuse_pointer

REMEDY = "correct the file, or fetch the checkpoint again"


def read_object(path: Path, limit: int, unique_keys: bool = True) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.  `unique_keys`: a key that occurs twice is refused.

    Raises CheckpointError, also where the file is missing or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path} has {size} bytes, the limit is {limit}; {REMEDY}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; give a checkpoint directory that has it"
        ) from error
    refuse_pointer(data[:64], path)
    return parse_object(data, str(path), unique_keys)


def parse_object(data: bytes, where: str, unique_keys: bool = True) -> dict[str, Any]:
    """A JSON object from bytes.  Raises CheckpointError: bad UTF-8, bad JSON, nested too deep, no object."""
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates if unique_keys else None)
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deep for JSON; {REMEDY}") from error
    except ValueError as error:  # covers UnicodeDecodeError and JSONDecodeError
        raise CheckpointError(f"{where} is not JSON: {error}; {REMEDY}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{where} holds a JSON {type(values).__name__}, it must hold an object; {REMEDY}"
        )
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values
