"""What a benchmark runs: an arm is one way to write texts, a sample what one text cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# For each role, the ids of its prompt.
Prompts = dict[str, list[int]]


@dataclass(frozen=True)
class Limits:
    """How long texts are: at most `max_tokens`, exactly so many with `ignore_eos`."""

    max_tokens: int
    ignore_eos: bool


@dataclass(frozen=True)
class Sample:
    """One text and its cost.  Passes are None where the arm cannot count them."""

    token_ids: tuple[int, ...]
    seconds: float
    authors: tuple[str, ...] = ()
    base_passes: int | None = None
    guide_passes: int | None = None
    drafted: int = 0
    accepted_lengths: tuple[int, ...] = ()


class Arm(Protocol):
    """One way to write a text.

    `text` names what it writes: arms of ours with one name must write the same, byte for byte.  A rival's is
    None: its kernels round in their own way.
    """

    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str | None: ...
    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        """Write one text, greedily; the sample's seconds are from the call to the last token."""
