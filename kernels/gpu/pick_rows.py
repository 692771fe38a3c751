"""Sampling on a GPU without a sort.

What top-k, top-p and min-p keep is always a beginning of the ranking by (logit, id).  So the pick of all
tokens is drawn first; if the filters remove it, they remove all that rank behind it, too, and the next pick
is drawn from those that rank before it, until one stays: the argmax over what is kept, in a few passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.gpu.common.radix_select import above, last_key, top_and_mass
from nudging.kernels.gpu.common.stats import LEVELS, PART, first_largest, merge_picks
from nudging.kernels.gpu.gumbel import COLD, scores

PARTS = 16  # Parts of a program, or of a step of one.
DIGIT = 4  # Bits of the k-th largest logit that a pass over the row finds.


@triton.jit
def _pick_parts(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, bests_ptr, picks_ptr, vocab, stride, parts,
    PARTS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A program per row and PARTS parts: the best of each, no filter applied."""
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    ids = (part[:, None] << LEVELS) + tl.arange(0, 1 << LEVELS)[None, :]
    logits = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    zero = tl.zeros([PARTS], tl.int64)
    temperature = tl.load(temperature_ptr + row + zero)
    seed, position = tl.load(seed_ptr + row + zero), tl.load(position_ptr + row + zero)
    best, pick = first_largest(scores(logits, temperature, seed, position, part, LEVELS), ids)
    tl.store(bests_ptr + row * parts + part, best, mask=part < parts)
    tl.store(picks_ptr + row * parts + part, pick, mask=part < parts)


@triton.jit
def best_before(
    logits_ptr, vocab, pivot, token, top, temperature, seed, position,
    PARTS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Of the tokens that rank before `token`, whose logit is `pivot`: number, mass, best score and its id."""
    zero = tl.zeros([PARTS], tl.int64)
    count, mass, best, found = 0, 0.0, float("-inf"), token
    for start in range(0, tl.cdiv(vocab, 1 << LEVELS), PARTS):
        part = start + tl.arange(0, PARTS)
        ids = (part[:, None] << LEVELS) + tl.arange(0, 1 << LEVELS)[None, :]
        x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))
        before = ((x > pivot) | ((x == pivot) & (ids < token))) & (ids < vocab)
        here = tl.sum(tl.sum(before.to(tl.int32), 1), 0)
        if here > 0:
            count += here
            mass += tl.sum(tl.sum(tl.where(before, tl.exp((x - top) / temperature), 0.0), 1), 0)
            drawn = scores(x, temperature + zero.to(tl.float32), seed + zero, position + zero, part, LEVELS)
            drawn = tl.where(before, drawn, float("-inf"))
            here_best = tl.max(tl.max(drawn, 1), 0)
            if here_best > best:
                best = here_best
                found = tl.min(tl.min(tl.where(drawn == here_best, ids, 0x7FFFFFFF), 1), 0)
    return count, mass, best, found


@triton.jit
def _filter_picks(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, token_ptr,
    vocab, stride, PARTS: tl.constexpr, LEVELS: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """A program per row: its pick of all tokens, replaced until one stays under the filters."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    k, p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    k = tl.where(k < vocab, k, 0)
    if (temperature >= COLD) & ((k > 0) | (p < 1) | (min_p > 0)):
        logits_ptr += row * stride
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        top, total = top_and_mass(logits_ptr, vocab, temperature, PARTS << LEVELS)
        if (k > 0) & (p < 1):
            # The mass of the k likeliest: as many of the last one's logit as are among them.
            last = last_key(logits_ptr, vocab, top, temperature, k, False, PARTS << LEVELS, DIGIT)
            count, mass, one = above(logits_ptr, vocab, top, temperature, last, PARTS << LEVELS)
            total = mass + (k - count).to(tl.float32) * one
        faintest = temperature * tl.log(min_p)
        token = tl.load(token_ptr + row)
        removed = True
        while removed:
            pivot = tl.load(logits_ptr + token)
            count, mass, best, found = best_before(
                logits_ptr, vocab, pivot, token, top, temperature, seed, position, PARTS, LEVELS
            )
            removed = ((k > 0) & (count >= k)) | ((p < 1) & (mass >= p * total)) | (pivot - top < faintest)
            removed = removed & (best > float("-inf"))
            token = tl.where(removed, found, token)
        tl.store(token_ptr + row, token)


def pick_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    op, device = "pick_rows", logits.device
    rows, vocab = sizes(op, "logits", logits, 2)
    logits = require(op, "logits", logits, (rows, vocab), torch.float32, device)
    temperature = require(op, "temperature", temperature, (rows,), torch.float32, device)
    top_k = require(op, "top_k", top_k, (rows,), torch.int32, device)
    top_p = require(op, "top_p", top_p, (rows,), torch.float32, device)
    min_p = require(op, "min_p", min_p, (rows,), torch.float32, device)
    seed = require(op, "seed", seed, (rows,), torch.int64, device)
    position = require(op, "position", position, (rows,), torch.int64, device)
    parts = triton.cdiv(vocab, PART)
    bests = torch.empty((rows, parts), dtype=torch.float32, device=device)
    picks = torch.empty((rows, parts), dtype=torch.int32, device=device)
    if rows > 0:
        _pick_parts[(triton.cdiv(parts, PARTS), rows)](
            logits, temperature, seed, position, bests, picks, vocab, logits.stride(0), parts, PARTS, LEVELS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    token = merge_picks(bests, picks)
    if rows > 0:
        _filter_picks[(rows,)](
            logits, temperature, top_k, top_p, min_p, seed, position, token, vocab, logits.stride(0),
            PARTS, LEVELS, DIGIT, num_warps=16, maxnreg=128, enable_fp_fusion=False,
        )  # fmt: skip
    return token


def pick(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """One row by the kernels of many: the token of a request does not depend on which of the two drew it."""
    device = logits.device
    warm, p, faint = torch.tensor([[temperature], [top_p], [min_p]], dtype=torch.float32, device=device)
    at = torch.tensor([position], dtype=torch.int64, device=device)
    key = torch.tensor([(seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=device)
    k = torch.tensor([top_k], dtype=torch.int32, device=device)
    return int(pick_rows(logits[None], warm, k, p, faint, key, at))
