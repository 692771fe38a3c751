"""What a request waits for: rows of one of its models, and the tokens written ahead of its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Need(NamedTuple):
    """The rows that stand in a request's way: after `tokens[:first]` .. `tokens[:last]` of one role's
    sequence, and behind them `ahead` more along the model's own path, where every next token is the one that
    the row before it picked; a token of `ends` ends the path.
    """

    role: str
    first: int
    last: int
    ahead: int = 0
    ends: frozenset[int] = frozenset()

    @property
    def end(self) -> int:
        """The last position that may be computed for it."""
        return self.last + self.ahead


@dataclass
class Draft:
    """Tokens written ahead from output position `start`: how many are wanted, and those there once
    complete.
    """

    start: int
    length: int
    tokens: list[int] = field(default_factory=list)
