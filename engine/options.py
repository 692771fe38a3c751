"""Unknown options fail with the same error as bad values."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from nudging.errors import BadRequest

C = TypeVar("C", bound=type)


def unknown_option(owner: str, unknown: Iterable[str], known: Iterable[str]) -> BadRequest:
    """The error for options that nobody has: names them, the nearest known one, and all known ones."""
    known = list(known)
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return BadRequest(f"{owner} has no option {', '.join(hints)}; it has {', '.join(known)}")


def strict(cls: C) -> C:
    """A dataclass whose constructor raises BadRequest, not TypeError, for an option it does not have."""
    original = cls.__init__  # type: ignore[misc]
    known = [field.name for field in dataclasses.fields(cls)]

    def __init__(self: Any, *values: Any, **options: Any) -> None:
        unknown = [name for name in options if name not in known]
        if unknown:
            raise unknown_option(cls.__name__, unknown, known)
        original(self, *values, **options)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls
