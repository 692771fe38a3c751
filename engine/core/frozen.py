"""What a caller hands in becomes the engine's own: nobody else can change it while requests run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from nudging.errors import BadRequest

T = TypeVar("T")


class FrozenMap(Mapping[int, float]):
    """A map that nobody can change, and that can be hashed."""

    def __init__(self, items: Mapping[int, float]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: int) -> float:
        return self._items[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def owned(policy: T) -> T:
    """The policy with copies of its lists, maps, sets and arrays; itself where it has none.

    Other objects are shared: what is in them is the caller's to keep as it is.  Raises BadRequest for a
    container that cannot be copied.
    """
    if isinstance(policy, type):
        # No policy at all; its reader says so.
        return policy
    names = list(getattr(policy, "__dict__", ()))
    if dataclasses.is_dataclass(policy):
        names += [field.name for field in dataclasses.fields(policy) if hasattr(policy, field.name)]
    shared = {name: value for name in names if _can_change(value := getattr(policy, name))}
    if not shared:
        return policy
    own = copy.copy(policy)
    for name, value in shared.items():
        try:
            object.__setattr__(own, name, copy.deepcopy(value))
        except Exception as error:
            raise BadRequest(
                f"{name} of {policy.__class__.__name__} cannot be copied ({error}); requests run with a copy "
                "of what a policy holds, so keep such things out of its lists and maps"
            ) from error
    return own


def snapshot(value: Any) -> Any:
    """A copy of lists, tuples and maps and of what is in them, down to values; iterators stay as they are."""
    if isinstance(value, list) and value and type(value[0]) is int:
        # Token ids: there may be millions.
        return list(value)
    if type(value) in (list, tuple):
        return type(value)(map(snapshot, value))
    if type(value) is dict:
        return {name: snapshot(item) for name, item in value.items()}
    return copy.deepcopy(value) if _can_change(value) else owned(value)


def _can_change(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_can_change, value))
    # NumPy's arrays and torch's tensors alike.
    return isinstance(value, (list, dict, set, bytearray)) or hasattr(value, "__array__")
