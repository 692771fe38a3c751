"""Softmax statistics by parts of the vocabulary: what `softmax_stats` and `lm_head` have in common.

A row's vocabulary is cut into parts of PART tokens.  The statistics of a part are one function of its logits,
wherever those come from, its sums a fixed tree of additions; and one kernel puts the parts together.  So the
statistics of logits that never were in memory have the bits of those that were.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 6
PART = 1 << LEVELS


@triton.jit
def tree_sum(x, LEVELS: tl.constexpr):
    """Sums over the last axis of [a, 1 << LEVELS], neighbours first: the same bits in every layout."""
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def first_largest(x, ids):
    """The largest of each row of x [a, b], where NaN is larger than all, and the lowest of its ids [a, b]."""
    nan = x != x
    top = tl.max(tl.where(nan, float("inf"), x), 1)
    any_nan = tl.max(nan.to(tl.int32), 1) > 0
    hit = tl.where(any_nan[:, None], nan, x == top[:, None])
    return tl.where(any_nan, float("nan"), top), tl.min(tl.where(hit, ids, 0x7FFFFFFF), 1)


@triton.jit
def part_stats(x, ids, LEVELS: tl.constexpr):
    """Of logits x [a, 1 << LEVELS] fp32 and their ids: max, the sums of e^d and of d e^d, argmax; [a] each.

    d is a logit less the maximum.  What is past the vocabulary is -inf.
    """
    top, arg = first_largest(x, ids)
    d = x - tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp(d)
    return top, tree_sum(e, LEVELS), tree_sum(tl.where(e == 0, 0.0, d * e), LEVELS), arg


@triton.jit
def merged_parts(tops, sums, args, LEVELS: tl.constexpr):
    """Of the parts of a row, [1, 1 << LEVELS] each: max, lse and argmax [1], the sum of all, and of each part
    its maximum less that of all and e to that.
    """
    top, arg = first_largest(tops, args)
    d = tops - tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp(d)
    total = tree_sum(tl.where(e == 0, 0.0, sums * e), LEVELS)
    return top, tl.where(tl.abs(top) < float("inf"), top + tl.log(total), top), arg, total, d, e


@triton.jit
def _merge_parts(
    stats_ptr, args_ptr, max_ptr, lse_ptr, argmax_ptr, entropy_ptr, parts, LEVELS: tl.constexpr
):  # fmt: skip
    """A program per row: the statistics of its parts, together."""
    row = tl.program_id(0)
    at = tl.arange(0, 1 << LEVELS)[None, :]
    stats_ptr += row.to(tl.int64) * 3 * parts
    tops = tl.load(stats_ptr + at, mask=at < parts, other=float("-inf"))
    sums = tl.load(stats_ptr + parts + at, mask=at < parts, other=0.0)
    expected = tl.load(stats_ptr + 2 * parts + at, mask=at < parts, other=0.0)
    args = tl.load(args_ptr + row.to(tl.int64) * parts + at, mask=at < parts, other=0x7FFFFFFF)
    top, lse, arg, total, d, e = merged_parts(tops, sums, args, LEVELS)
    mean = tree_sum(tl.where(e == 0, 0.0, (expected + d * sums) * e), LEVELS) / total
    one = row + tl.arange(0, 1)
    tl.store(max_ptr + one, top)
    tl.store(lse_ptr + one, lse)
    tl.store(entropy_ptr + one, tl.where(tl.abs(top) < float("inf"), tl.log(total) - mean, top))
    tl.store(argmax_ptr + one, arg)


def merge_parts(stats: Tensor, args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max, lse, argmax, entropy [rows] from the parts' stats [rows, 3, parts] and argmaxes [rows, parts]."""
    rows, parts = args.shape
    top, lse, entropy = (torch.empty(rows, dtype=torch.float32, device=args.device) for _ in range(3))
    argmax = torch.empty(rows, dtype=torch.int32, device=args.device)
    if rows > 0:
        _merge_parts[(rows,)](
            stats, args, top, lse, argmax, entropy, parts, (parts - 1).bit_length(),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return top, lse, argmax, entropy


@triton.jit
def _merge_picks(bests_ptr, picks_ptr, token_ptr, parts, BLOCK: tl.constexpr):
    """A program per row: the best of its parts' best."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)[None, :]
    offset = row.to(tl.int64) * parts + at
    bests = tl.load(bests_ptr + offset, mask=at < parts, other=float("-inf"))
    picks = tl.load(picks_ptr + offset, mask=at < parts, other=0x7FFFFFFF)
    _, pick = first_largest(bests, picks)
    tl.store(token_ptr + row + tl.arange(0, 1), pick)


def merge_picks(bests: Tensor, picks: Tensor) -> Tensor:
    """The token [rows] of the best score, ties to the lowest, from the parts' best [rows, parts]."""
    rows, parts = bests.shape
    token = torch.empty(rows, dtype=torch.int32, device=bests.device)
    if rows > 0:
        _merge_picks[(rows,)](
            bests, picks, token, parts, triton.next_power_of_2(parts), num_warps=4, enable_fp_fusion=False
        )
    return token
