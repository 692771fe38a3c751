"""What a benchmark runs: an arm is one way to write texts, a sample what one text cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# How many tokens' log-probabilities are asked of an engine that does not give all of them.
TOP = 20
# What rounding may leave of a row's probability beside those of the likeliest tokens.
LEAST_LEFT = 1e-12
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


@dataclass(frozen=True)
class Setting:
    """What rivals are opened on: two checkpoints, a folder for files of their own, and the base as OpenVINO
    reads it, where it was exported.
    """

    base: Path
    guide: Path
    device: torch.device
    threads: int
    folder: Path
    openvino_ir: Path | None = None


def up_to_end(token_ids: Iterable[int], eos_ids: frozenset[int], limits: Limits) -> tuple[int, ...]:
    """The tokens before the end of sequence, which our own texts do not have, either."""
    if limits.ignore_eos:
        return tuple(token_ids)
    return tuple(takewhile(lambda token: token not in eos_ids, token_ids))


def checkpoint_bytes(folder: Path) -> int:
    """What a checkpoint's weights take in its files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rows_of(tops: Sequence[Mapping[int, float]], vocab: int) -> Tensor:
    """Log-probabilities [n, vocab] fp32, where an engine names the likeliest tokens of n rows only, {id:
    log-probability}: the others have equal parts of what is left.
    """
    rows = torch.empty(len(tops), vocab)
    for row, top in zip(rows, tops, strict=True):
        known = torch.tensor(list(top.values()))
        left = (1 - known.double().exp().sum()).clamp(min=LEAST_LEFT) / max(vocab - len(top), 1)
        row.fill_(float(left.log()))
        row[list(top)] = known
    return rows


class Rival(Arm, Protocol):
    """Another engine with the base in it."""

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """What its base says after each token of each text: fp32 [n, vocab]."""
