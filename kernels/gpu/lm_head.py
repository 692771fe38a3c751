"""The final projection on a GPU, fused with its statistics and the pick: no logits are written.

A program multiplies 16 rows with the weights of one part of the vocabulary, by the tile of `linear`, and
leaves the part's statistics as `softmax_stats` does: the bits are those of the ops one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..check import require
from ..lm_head import LmHead
from ..weight import Weight
from .configs import config_of
from .gumbel import scores
from .math import cap_logits
from .source import Source
from .stats import LEVELS, PART, first_largest, merge_parts, merge_picks, part_stats
from .tile import all_partitions, finished, partition


@triton.jit(do_not_specialize=["rows"])
def _lm_head(
    x_ptr, weight_ptr, scales_ptr, temperature_ptr, seed_ptr, position_ptr,
    stats_ptr, args_ptr, bests_ptr, picks_ptr,
    rows, features, held, vocab, stride, inputs, parts, cap,
    HAS_SCALES: tl.constexpr, CAPPED: tl.constexpr, LEVELS: tl.constexpr,
    PARTITIONS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    ids = (part << LEVELS) + tl.arange(0, 1 << LEVELS)
    known = tl.minimum(ids, held - 1)
    logits = all_partitions(
        x_ptr, weight_ptr, weight_ptr, weight_ptr, row, known, rows, features, stride, inputs, 0.0,
        PARTITIONS, 0, 0, ROWS, 1 << LEVELS, DEPTH,
    )  # fmt: skip
    logits = finished(logits, scales_ptr, scales_ptr, known, HAS_SCALES, False)
    logits = tl.reshape(logits, (ROWS, 1 << LEVELS))
    if CAPPED:
        logits = cap_logits(logits, cap)
    logits = tl.where((ids < vocab)[None, :], logits, float("-inf"))
    own = row < rows
    row = row.to(tl.int64)
    every = tl.zeros([ROWS, 1], tl.int32) + ids[None, :]
    top, total, expected, arg = part_stats(logits, every, LEVELS)
    tl.store(stats_ptr + row * 3 * parts + part, top, mask=own)
    tl.store(stats_ptr + (row * 3 + 1) * parts + part, total, mask=own)
    tl.store(stats_ptr + (row * 3 + 2) * parts + part, expected, mask=own)
    tl.store(args_ptr + row * parts + part, arg, mask=own)
    every_part = tl.zeros([ROWS], tl.int32) + part
    temperature = tl.load(temperature_ptr + row, mask=own, other=0.0)
    seed = tl.load(seed_ptr + row, mask=own, other=0)
    position = tl.load(position_ptr + row, mask=own, other=0)
    best, pick = first_largest(scores(logits, temperature, seed, position, every_part, LEVELS), every)
    tl.store(bests_ptr + row * parts + part, best, mask=own)
    tl.store(picks_ptr + row * parts + part, pick, mask=own)


def lm_head(
    x: Tensor, weight: Weight, vocab: int, cap: float, temperature: Tensor, seed: Tensor, position: Tensor
) -> LmHead:
    op = "lm_head"
    source = Source.of(op, x, weight, None, None)
    x, values, scales = source[:3]
    (rows, features), held = x.shape, values.shape[0]
    if not 0 < vocab <= held:
        raise ValueError(f"{op}: vocab is {vocab}; the weight has rows for 1 to {held} tokens")
    temperature = require(op, "temperature", temperature, (rows,), torch.float32, x.device)
    seed = require(op, "seed", seed, (rows,), torch.int64, x.device)
    position = require(op, "position", position, (rows,), torch.int64, x.device)
    parts = triton.cdiv(vocab, PART)
    stats = torch.empty((rows, 3, parts), dtype=torch.float32, device=x.device)
    bests = torch.empty((rows, parts), dtype=torch.float32, device=x.device)
    args, picks = (torch.empty((rows, parts), dtype=torch.int32, device=x.device) for _ in range(2))
    tile = config_of(x.device).head[x.dtype.itemsize]
    inputs = partition(features, held)
    if rows > 0:
        _lm_head[(triton.cdiv(rows, tile.rows), parts)](
            x, values, scales, temperature, seed, position, stats, args, bests, picks,
            rows, features, held, vocab, x.stride(0), inputs, parts, cap,
            source.has_scales, cap > 0, LEVELS,
            triton.cdiv(features, inputs) if inputs else 0, tile.rows, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=255, enable_fp_fusion=False,
        )  # fmt: skip
    return LmHead(*merge_parts(stats, args), merge_picks(bests, picks))
