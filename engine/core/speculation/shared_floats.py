"""Floats of a Python object that C++ reads and writes, too."""

from __future__ import annotations

from array import array
from typing import Protocol


class HasNumbers(Protocol):
    @property
    def numbers(self) -> array[float]:
        """Its floats; never resized, so that their address holds."""


class Number:
    """An attribute that is the `index`-th of its object's numbers."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, owner: HasNumbers, kind: type | None = None) -> float:
        return owner.numbers[self._index]

    def __set__(self, owner: HasNumbers, value: float) -> None:
        owner.numbers[self._index] = value


def address(owner: HasNumbers) -> int:
    """Where the numbers lie, as long as `owner` lives."""
    return owner.numbers.buffer_info()[0]
