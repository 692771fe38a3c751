"""A checkpoint's JSON files as untrusted input: every value is checked before anything is built from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from nudging.errors import CheckpointError
from nudging.files.json_file import REMEDY, parse_object, read_object

MAX_JSON_BYTES = 16 << 20  # a weight map of 100,000 tensors is about 10 MB
MISSING = object()  # equal to no JSON value


@dataclass(frozen=True)
class RawConfig:
    """The keys of a JSON object with checks; `where` says in messages which file, and which part of it.

    `seen`: the keys that were asked for, so that one that nobody asks for can be refused.
    """

    values: dict[str, Any]
    where: str
    seen: set[str] = field(default_factory=set, compare=False, repr=False)

    def wrong(self, key: str, limit: str) -> NoReturn:
        """Raise CheckpointError: the value of `key` is not what `limit` says it must be."""
        if key not in self.values:
            raise CheckpointError(f"{self.where}: {printable(key)} is missing, it must be {limit}; {REMEDY}")
        value = shown(self.values[key])
        raise CheckpointError(f"{self.where}: {printable(key)} = {value}, it must be {limit}; {REMEDY}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key` as it stands, `default` where it is missing."""
        self.seen.add(key)
        return self.values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.get(key) is not None

    def integer(self, key: str, limit: int, default: int | None = None, least: int = 1) -> int:
        """An integer in least..limit; `default` where the key is missing or null."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
            self.wrong(key, f"an integer from {least} to {limit}")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in (low, high]; `default` where the key is missing or null."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not is_number(value) or not low < value <= high:
            self.wrong(key, f"a number above {low:g} and at most {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; `default` where the key is missing or null."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default` where the key is missing or null."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.wrong(key, "a string")
        return value

    def zero(self, key: str) -> bool:
        """Whether `key` is the number 0, which some keys have for "none"."""
        value = self.get(key)
        return is_number(value) and value == 0

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length or not all(map(is_number, value)):
            self.wrong(key, f"a list of {length} numbers")
        if not all(0 < v <= 1e12 for v in value):
            self.wrong(key, "a list of positive numbers")
        return tuple(float(v) for v in value)

    def part(self, key: str) -> RawConfig:
        """The object under `key`; an empty one where the key is missing or null."""
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.wrong(key, "an object")
        return RawConfig(value, f"{self.where}: {printable(key)}")

    def over(self, defaults: dict[str, Any]) -> RawConfig:
        """The same with `defaults` for the keys that are missing; a null stays a null."""
        return RawConfig({**defaults, **self.values}, self.where, self.seen)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a finite number (an integer of any length would not fit a float)."""
    if isinstance(value, bool):
        return False
    return (
        isinstance(value, int) and abs(value) < 1 << 53 or isinstance(value, float) and math.isfinite(value)
    )


def shown(value: object) -> str:
    """An untrusted value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(name: str) -> str:
    """An untrusted name as it may stand in a message: no control characters, not endless."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= 120 else name[:117] + "..."


def read_json(path: Path) -> RawConfig:
    """The JSON object in a file.  Raises CheckpointError when it is missing, too large, or no JSON object."""
    return RawConfig(read_object(path, MAX_JSON_BYTES), str(path))


def parse_json(data: bytes, where: str) -> RawConfig:
    """A JSON object from bytes.  Raises CheckpointError."""
    return RawConfig(parse_object(data, where), where)
