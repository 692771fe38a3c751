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

from nudging.kernels.gpu.common.stats import PART

T = TypeVar("T")

# Rows of a decoding pass: those of one matrix instruction.
FEW_ROWS = 16


class Tile(NamedTuple):
    """A program's rows, columns and inputs of a share at a time, and its pipeline's stages."""

    rows: int
    cols: int
    depth: int
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

    products: by bytes of an input and of a weight, then by the most rows and the most columns; head: by bytes
    of an input, then by the most rows; attention: keys, warps and stages by bytes, then by the most channels
    of a head.  fused_norms: whether norms are computed within products of few rows.  pdl: whether a kernel
    is launched while the one before it ends (pdl.py; from compute capability 9.0 on).
    """

    products: Mapping[tuple[int, int], Mapping[int | None, Mapping[int | None, Tile]]]
    head: Mapping[int, Mapping[int | None, Tile]]
    attention: Mapping[int, Mapping[int | None, tuple[int, int, int]]]
    fused_norms: bool
    pdl: bool

    def tile(self, dtype: torch.dtype, weight: torch.dtype, rows: int, cols: int) -> Tile:
        """That of a product of so many rows and columns."""
        return first(first(self.products[dtype.itemsize, weight.itemsize], rows), cols)

    def head_tile(self, dtype: torch.dtype, rows: int) -> Tile:
        """That of the head, of so many rows."""
        return first(self.head[dtype.itemsize], rows)

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
            # Left alone, the assembler aims at fewer registers than there are and spills some.
            made |= {"num_stages": stages, "maxnreg": 255}
        return made | ({"launch_pdl": True} if self.pdl else {})


MANY_ROWS: dict[int | None, dict[int | None, Tile]] = {
    32: {None: Tile(32, 32, 64, 3)},
    64: {None: Tile(64, 32, 32, 4)},
    None: {1024: Tile(32, 32, 32, 4), None: Tile(64, 64, 32, 3)},
}
FP32: dict[int | None, dict[int | None, Tile]] = {
    8: {None: Tile(8, 16, 32, 4)},
    FEW_ROWS: {None: Tile(16, 16, 32, 4)},
    None: {None: Tile(32, 32, 16, 3)},
}
# From the compiler and from arithmetic: no GPU has been at hand.  All tiles fit into the 99 KiB of shared
# memory that any GPU since 2020 has, and those of a few rows ask so little of it and of the schedulers that
# the memory of the device is what a pass waits for (tests/support/demand.py).
DEFAULT = Config(
    products={
        (2, 2): {
            8: {4096: Tile(8, 16, 128, 4), None: Tile(8, 32, 64, 4)},
            FEW_ROWS: {4096: Tile(16, 16, 64, 5), None: Tile(16, 32, 64, 4)},
            **MANY_ROWS,
        },
        (2, 1): {
            8: {2048: Tile(8, 16, 128, 4), None: Tile(8, 32, 128, 3)},
            FEW_ROWS: {None: Tile(16, 32, 128, 3)},
            **MANY_ROWS,
        },
        (4, 4): FP32,
        (4, 1): FP32,
    },
    # The columns are a part of the vocabulary (stats.py); more rows would not fit into a warp.
    head={
        2: {8: Tile(8, PART, 64, 3), None: Tile(16, PART, 64, 3)},
        4: {8: Tile(8, PART, 16, 2), None: Tile(16, PART, 16, 2)},
    },
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
