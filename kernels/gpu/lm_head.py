"""The final projection on a GPU, fused with its statistics and the pick: no logits are written.

A program multiplies 16 rows with the weights of one part of the vocabulary, by the tile of `linear`, and
leaves the part's statistics as `softmax_stats` does; a second kernel puts the parts of a row together.  The
bits are those of the ops one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.math import cap_logits
from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.product_input import Source
from nudging.kernels.gpu.common.stats import LEVELS, PART, first_largest, merged_parts, part_stats
from nudging.kernels.gpu.common.tile import SHARES, all_partitions, begin_product, finished, partition
from nudging.kernels.gpu.gumbel import scores
from nudging.kernels.lm_head import ARGMAX, LINES, LSE, MAX, TOKEN
from nudging.kernels.rms_norm import Norm
from nudging.kernels.weight import Weight


@triton.jit(do_not_specialize=["rows", "count"])
def _lm_head(
    x_ptr, weight_ptr, scales_ptr, norm_ptr, squares_ptr, eps, rows_ptr, temperature_ptr, seed_ptr,
    position_ptr, stats_ptr, ids_ptr, rows, count, features, held, vocab, stride, inputs, parts, cap,
    HAS_SCALES: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr, CAPPED: tl.constexpr,
    LEVELS: tl.constexpr, PARTITIONS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """For each part of a row its max, sum and best score, into `stats`, and their tokens, into `ids`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own, part = row < count, tl.program_id(1)
    tokens = (part << LEVELS) + tl.arange(0, 1 << LEVELS)
    known = tl.minimum(tokens, held - 1)
    begin_product(weight_ptr, known, 0, tl.minimum(inputs, features), features, PDL, 1 << LEVELS)
    r = tl.load(rows_ptr + row, mask=own, other=rows)
    logits = all_partitions(
        x_ptr, weight_ptr, norm_ptr, squares_ptr, r, known, rows, features, stride, inputs, eps,
        PARTITIONS, NORM, SUMS, ROWS, 1 << LEVELS, DEPTH,
    )  # fmt: skip
    logits = finished(logits, scales_ptr, scales_ptr, known, HAS_SCALES, False)
    if CAPPED:
        logits = cap_logits(logits, cap)
    logits = tl.where((tokens < vocab)[None, :], logits, float("-inf"))
    every = tl.zeros([ROWS, 1], tl.int32) + tokens[None, :]
    top, total, _, arg = part_stats(logits, every, LEVELS)
    every_part = tl.zeros([ROWS], tl.int32) + part
    temperature = tl.load(temperature_ptr + row, mask=own, other=0.0)
    seed = tl.load(seed_ptr + row, mask=own, other=0)
    position = tl.load(position_ptr + row, mask=own, other=0)
    best, pick = first_largest(scores(logits, temperature, seed, position, every_part, LEVELS), every)
    row = row.to(tl.int64)
    stats_ptr += row * 3 * parts + part
    tl.store(stats_ptr, top, mask=own)
    tl.store(stats_ptr + parts, total, mask=own)
    tl.store(stats_ptr + 2 * parts, best, mask=own)
    ids_ptr += row * 2 * parts + part
    tl.store(ids_ptr, arg, mask=own)
    tl.store(ids_ptr + parts, pick, mask=own)


@triton.jit(do_not_specialize=["stride"])
def _merge_head(
    stats_ptr, ids_ptr, out_ptr, parts, stride, PDL: tl.constexpr, TOKEN: tl.constexpr, ARGMAX: tl.constexpr,
    MAX: tl.constexpr, LSE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A program per row: what its parts say together."""
    begin(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, 1 << LEVELS)[None, :]
    there = at < parts
    stats_ptr += row.to(tl.int64) * 3 * parts + at
    ids_ptr += row.to(tl.int64) * 2 * parts + at
    tops = tl.load(stats_ptr, mask=there, other=float("-inf"))
    sums = tl.load(stats_ptr + parts, mask=there, other=0.0)
    bests = tl.load(stats_ptr + 2 * parts, mask=there, other=float("-inf"))
    args = tl.load(ids_ptr, mask=there, other=0x7FFFFFFF)
    picks = tl.load(ids_ptr + parts, mask=there, other=0x7FFFFFFF)
    top, lse, arg, _, _, _ = merged_parts(tops, sums, args, LEVELS)
    _, token = first_largest(bests, picks)
    out_ptr += row + tl.arange(0, 1)
    tl.store(out_ptr + TOKEN * stride, token)
    tl.store(out_ptr + ARGMAX * stride, arg)
    tl.store(out_ptr + MAX * stride, top.to(tl.int32, bitcast=True))
    tl.store(out_ptr + LSE * stride, lse.to(tl.int32, bitcast=True))


def lm_head(
    x: Tensor,
    weight: Weight,
    vocab: int,
    cap: float,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    rows: Tensor,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    op, device = "lm_head", x.device
    source = Source.of(op, x, weight, None, norm)
    x, values, scales, _, *of_norm = source[:7]
    (total, features), held, count = x.shape, values.shape[0], sizes(op, "rows", rows, 1)[0]
    if not 0 < vocab <= held:
        raise ValueError(f"{op}: vocab is {vocab}; the weight has rows for 1 to {held} tokens")
    rows = require(op, "rows", rows, (count,), torch.int64, device)
    temperature = require(op, "temperature", temperature, (count,), torch.float32, device)
    seed = require(op, "seed", seed, (count,), torch.int64, device)
    position = require(op, "position", position, (count,), torch.int64, device)
    out = torch.empty((LINES, count), dtype=torch.int32, device=device) if out is None else out
    if out.shape != (LINES, count) or out.dtype != torch.int32 or out.stride(1) != 1 or out.device != device:
        raise ValueError(
            f"{op}: out is {tuple(out.shape)} {out.dtype}, not dense lines {(LINES, count)} of int32"
        )
    if count == 0:
        return out
    parts = triton.cdiv(vocab, PART)
    stats = torch.empty((count, 3, parts), dtype=torch.float32, device=device)
    ids = torch.empty((count, 2, parts), dtype=torch.int32, device=device)
    config = config_of(device)
    tile, inputs = config.head_tile(x.dtype, count), partition(features, held)
    _lm_head[(triton.cdiv(count, tile.rows), parts)](
        x, values, scales, *of_norm, rows, temperature, seed, position, stats, ids,
        total, count, features, held, vocab, x.stride(0), inputs, parts, cap,
        source.has_scales, source.kind, source.levels, cap > 0, LEVELS,
        triton.cdiv(features, inputs) if inputs else 0, config.pdl, tile.rows, tile.depth,
        **config.options(SHARES.value, tile.stages),
    )  # fmt: skip
    _merge_head[(count,)](
        stats, ids, out, parts, out.stride(0), config.pdl, TOKEN, ARGMAX, MAX, LSE, (parts - 1).bit_length(),
        **config.options(4),
    )  # fmt: skip
    return out
