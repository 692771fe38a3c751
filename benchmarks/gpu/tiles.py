"""Which tiles a product of few rows should have on this GPU: what `kernels/gpu/configs.py` is filled from.

Nothing chooses a tile while an engine runs; who has a GPU that is not in the table runs this, and puts what
won into it.  No tile changes a bit.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import layout_products, micro
from benchmarks.gpu.parts import Found
from benchmarks.gpu.passes import configured
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import Spread, time_recorded
from benchmarks.inflate import Layout
from nudging.kernels.linear import linear

COLS, DEPTHS, STAGES = (16, 32, 64), (64, 128, 256), (3, 4, 6)
# Bytes of shared memory that a program may have on a GPU of compute capability 9.
MOST_SHARED = 227 << 10
SHARES = 4
SHOWN = 5

# Rows, columns, depth, stages.
Shape = tuple[int, int, int, int]


def candidates(rows: int) -> list[Shape]:
    """Tiles of so many rows whose pipeline fits, twice on a multiprocessor unless it is short."""
    found = []
    for cols, depth, stages in product(COLS, DEPTHS, STAGES):
        shared = SHARES * (rows + cols) * depth * 2 * (stages - 1)
        if shared <= MOST_SHARED // (1 if stages == STAGES[0] else 2):
            found.append((rows, cols, depth, stages))
    return found


def tiles(device: torch.device, scale: Scale, layout: Layout, bandwidth: float) -> Found:
    """Every product of a layer in bf16, of one row (tiles of 8) and of 16, by every tile."""
    found = Found()
    for name, (cols, features) in layout_products(layout).items():
        count = max(1, scale.copies // (2 * cols * features))
        weights = torch.randn((count, cols, features), device=device).to(torch.bfloat16).unbind(0)
        bound = weights[0].nbytes / bandwidth
        for rows, tile_rows in ((1, 8), (16, 16)):
            x = torch.randn((rows, features), device=device).to(torch.bfloat16)
            what = f"{name} [{cols}, {features}], {rows} row{'s' * (rows > 1)}"
            shipped = timed(x, weights, device, scale)
            found.figures.append(micro(f"linear, shipped tile: {what}", shipped, bound))
            spreads = {shape: by_tile(shape, x, weights, device, scale) for shape in candidates(tile_rows)}
            ranked = sorted(spreads, key=lambda shape: spreads[shape][1])
            found.figures.append(micro(f"linear, best tile {ranked[0]}: {what}", spreads[ranked[0]], bound))
            found.details[what] = {str(shape): spreads[shape][1] * 1e6 for shape in ranked[:SHOWN]}
    return found


def by_tile(
    shape: Shape, x: Tensor, weights: tuple[Tensor, ...], device: torch.device, scale: Scale
) -> Spread:
    with configured(device, **products_of(shape, device)):
        return timed(x, weights, device, scale)


def products_of(shape: Shape, device: torch.device) -> dict[str, Any]:
    """The table's products, if all had this tile."""
    if device.type != "cuda":
        return {}
    from nudging.kernels.gpu.common.configs import Tile

    return {"products": {(2, 2): {None: {None: Tile(*shape)}}}}


def timed(x: Tensor, weights: tuple[Tensor, ...], device: torch.device, scale: Scale) -> Spread:
    def run() -> None:
        for weight in weights:
            linear(x, weight)

    return time_recorded(run, device, scale.repeats, len(weights))
