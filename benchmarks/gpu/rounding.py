"""Whether the matrix instruction of large tiles rounds as the one that all our products use.

`tile.py` keeps to mma.sync because nothing says so.  Where it does, bit for bit, long prompts can have the
faster instruction and still the bits of a row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH = 64, 64


@triton.jit
def _chain(a_ptr, b_ptr, out_ptr, features, ALONE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """a @ b.T of [TILE, features] each; ALONE: as one of a batch, for which there is mma.sync only."""
    i, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
    sums = tl.zeros([TILE, TILE], tl.float32)
    if ALONE:
        sums = tl.zeros([1, TILE, TILE], tl.float32)
    for start in range(0, features, DEPTH):
        a = tl.load(a_ptr + i[:, None] * features + start + k[None, :])
        b = tl.load(b_ptr + i[None, :] * features + start + k[:, None])
        if ALONE:
            sums = tl.dot(tl.reshape(a, [1, TILE, DEPTH]), tl.reshape(b, [1, DEPTH, TILE]), sums)
        else:
            sums = tl.dot(a, b, sums)
    tl.store(out_ptr + i[:, None] * TILE + i[None, :], tl.reshape(sums, [TILE, TILE]))


def product(a: Tensor, b: Tensor, alone: bool) -> Tensor:
    out = torch.empty((TILE, TILE), dtype=torch.float32, device=a.device)
    _chain[(1,)](a, b, out, a.shape[1], alone, TILE, DEPTH, num_warps=4, enable_fp_fusion=False)
    return out


def same_bits(device: torch.device, features: int) -> dict[str, float]:
    """The share of results that both instructions give the same bits to, by type."""
    shares = {}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn((TILE, features), device=device).to(dtype) for _ in range(2))
        equal = product(a, b, True).view(torch.int32) == product(a, b, False).view(torch.int32)
        shares[str(dtype).removeprefix("torch.")] = float(equal.float().mean())
    return shares
