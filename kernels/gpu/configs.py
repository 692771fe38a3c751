"""How programs work on which GPU: the one table of tiles, warps and stages.

Nothing is tuned at start-up: two runs, and two machines of a kind, launch the same kernels.  A GPU without an
entry works by DEFAULT, and `nudging info` says so.  What fixes the order of additions is not here: partitions
of a product (tile.py), splits of the keys, parts of a vocabulary.  So no entry changes a bit, but for the
keys of a tile of attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from .stats import PART

T = TypeVar("T")

# Rows of a decoding pass: those of one matrix instruction.
FEW_ROWS = 16


class Tile(NamedTuple):
    """A program's rows, columns and inputs at a time, its warps and its pipeline's stages."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


class Keys(NamedTuple):
    """Of attention: a program's channels, a power of two, its keys at a time, its warps and stages."""

    dim: int
    keys: int
    warps: int
    stages: int


def first(table: Mapping[int | None, T], size: int) -> T:
    """The entry for the smallest size that is not below this one; None stands for any."""
    return next(entry for most, entry in table.items() if most is None or size <= most)


@dataclass(frozen=True)
class Config:
    """The table of one GPU.

    products: by bytes of an element, then by the most rows and the most columns; head: by bytes; attention:
    keys, warps and stages by bytes, then by the most channels of a head.  fused_norms: whether norms are
    computed within the products of few rows.  pdl: whether a kernel is launched while the one before it ends
    (pdl.py; from compute capability 9.0 on).
    """

    products: Mapping[int, Mapping[int | None, Mapping[int | None, Tile]]]
    head: Mapping[int, Tile]
    attention: Mapping[int, Mapping[int | None, tuple[int, int, int]]]
    fused_norms: bool
    pdl: bool

    def tile(self, dtype: torch.dtype, rows: int, cols: int) -> Tile:
        """That of a product of so many rows and columns."""
        return first(first(self.products[dtype.itemsize], rows), cols)

    def keys(self, dtype: torch.dtype, head_dim: int) -> Keys:
        """That of attention over heads of so many channels."""
        dim = max(triton.next_power_of_2(head_dim), 16)
        return Keys(dim, *first(self.attention[dtype.itemsize], dim))

    def leaves_squares(self, rows: int) -> bool:
        """Whether the sums of squares of so many rows are left for the product that reads them; the norms of
        more are launches of their own.
        """
        return self.fused_norms and rows <= FEW_ROWS

    def options(self, warps: int, stages: int | None = None) -> dict[str, Any]:
        """What a kernel that begins with `begin` is launched with."""
        made: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
        if stages is not None:
            made["num_stages"] = stages
        return made | ({"launch_pdl": True} if self.pdl else {})


# From the compiler and from arithmetic: no GPU has been at hand.  All tiles fit into the 99 KiB of shared
# memory that any GPU since 2020 has, and into the registers of a warp: Triton 3.6 gives the whole of a
# product of three dimensions to every warp, where 3.9 shares it out.
DEFAULT = Config(
    products={
        2: {
            FEW_ROWS: {
                4096: Tile(16, 16, 256, 4, 6),
                16384: Tile(16, 32, 128, 4, 5),
                None: Tile(16, 64, 128, 4, 5),
            },
            None: {None: Tile(32, 64, 32, 2, 4)},
        },
        4: {FEW_ROWS: {None: Tile(16, 32, 32, 4, 4)}, None: {None: Tile(32, 64, 32, 4, 3)}},
    },
    # The columns are a part of the vocabulary (stats.py); more rows would not fit into a warp.
    head={2: Tile(16, PART, 128, 4, 3), 4: Tile(16, PART, 16, 8, 2)},
    attention={2: {128: (64, 4, 3), None: (32, 4, 2)}, 4: {None: (16, 8, 2)}},
    fused_norms=True,
    pdl=False,
)

# By compute capability.
TABLE: dict[tuple[int, int], Config] = {(8, 0): DEFAULT, (9, 0): DEFAULT, (10, 0): DEFAULT}


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, None for what is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def config_of(device: torch.device) -> Config:
    """The table that a device works by."""
    found = capability(device)
    return DEFAULT if found is None else TABLE.get(found, DEFAULT)
