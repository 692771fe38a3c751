"""Mixtures of logits on a GPU: one pass over the roles' rows, after one that finds the nucleus."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.gpu.common.radix_select import above, last_key, loaded, rank_key, top_and_mass
from nudging.kernels.gpu.softmax_stats import softmax_stats

BLOCK = 1024
DIGIT = 4


@triton.jit
def _nucleus(
    logits_ptr, p_ptr, temperature_ptr, key_ptr, last_ptr, vocab, BLOCK: tl.constexpr, DIGIT: tl.constexpr
):  # fmt: skip
    """A program per row: the key of the nucleus' least likely tokens, and the last id of that key inside."""
    row = tl.program_id(0).to(tl.int64)
    p, temperature = tl.load(p_ptr + row), tl.load(temperature_ptr + row)
    logits_ptr += row * vocab
    key, last = tl.full((), 0, tl.uint32), vocab
    if p < 1:
        top, total = top_and_mass(logits_ptr, vocab, temperature, BLOCK)
        wanted = p * total
        key = last_key(logits_ptr, vocab, top, temperature, wanted, True, BLOCK, DIGIT)
        key = tl.where(wanted > 0, key, rank_key(top))
        _, mass, one = above(logits_ptr, vocab, top, temperature, key, BLOCK)
        # Of the tokens of this key those stay that have less than `wanted` before them, the first anyway.
        before = mass
        last = -1
        for start in range(0, vocab, BLOCK):
            ids, x = loaded(logits_ptr, start, vocab, BLOCK)
            same = (rank_key(x) == key) & (ids < vocab)
            here = tl.cumsum(same.to(tl.int32), 0)
            inside = same & ((before + (here - 1).to(tl.float32) * one < wanted) | ((last < 0) & (here == 1)))
            last = tl.maximum(last, tl.max(tl.where(inside, ids, -1), 0))
            before += tl.sum(same.to(tl.int32), 0).to(tl.float32) * one
    tl.store(key_ptr + row, key.to(tl.int64))
    tl.store(last_ptr + row, last)


@triton.jit
def _mix_logits(
    logits_ptr, weights_ptr, lse_ptr, key_ptr, last_ptr, out_ptr, rows, vocab, nucleus_role,
    ROLES: tl.constexpr, PROBABILITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mixed = tl.zeros([BLOCK], tl.float32)
    out = ids >= vocab
    for role in tl.static_range(ROLES):
        at = role * rows + row
        weight = tl.load(weights_ptr + at)
        x = tl.load(logits_ptr + at * vocab + ids, mask=ids < vocab, other=0.0)
        if PROBABILITIES:
            share = weight * tl.exp(x - tl.load(lse_ptr + at))
        else:
            share = weight * x
            out = out | ((weight != 0) & (x == float("-inf")))
        share = tl.where(weight != 0, share, 0.0)
        mixed = share if role == 0 else mixed + share
    if PROBABILITIES:
        mixed = tl.log(mixed)
    x = tl.load(logits_ptr + (nucleus_role * rows + row) * vocab + ids, mask=ids < vocab, other=0.0)
    key, last = tl.load(key_ptr + row).to(tl.uint32), tl.load(last_ptr + row)
    outside = (rank_key(x) < key) | ((rank_key(x) == key) & (ids > last))
    mixed = tl.where(out | outside, float("-inf"), mixed)
    tl.store(out_ptr + row * vocab + ids, mixed, mask=ids < vocab)


def mix_logits(
    logits: Tensor,
    weights: Tensor,
    probabilities: bool,
    nucleus_role: int,
    nucleus_p: Tensor,
    nucleus_temperature: Tensor,
) -> Tensor:
    op, device = "mix_logits", logits.device
    roles, rows, vocab = sizes(op, "logits", logits, 3)
    logits = require(op, "logits", logits, (roles, rows, vocab), torch.float32, device)
    weights = require(op, "weights", weights, (roles, rows), torch.float32, device)
    p = require(op, "nucleus_p", nucleus_p, (rows,), torch.float32, device)
    temperature = require(op, "nucleus_temperature", nucleus_temperature, (rows,), torch.float32, device)
    if not 0 <= nucleus_role < roles:
        raise ValueError(f"{op}: nucleus_role is {nucleus_role}; there are roles 0 to {roles - 1}")
    out = torch.empty((rows, vocab), dtype=torch.float32, device=device)
    if rows == 0:
        return out
    lse = softmax_stats(logits.view(roles * rows, vocab)).lse if probabilities else weights
    key = torch.empty(rows, dtype=torch.int64, device=device)
    last = torch.empty(rows, dtype=torch.int32, device=device)
    _nucleus[(rows,)](
        logits[nucleus_role], p, temperature, key, last, vocab, BLOCK, DIGIT,
        num_warps=8, maxnreg=255, enable_fp_fusion=False,
    )  # fmt: skip
    _mix_logits[(triton.cdiv(vocab, BLOCK), rows)](
        logits, weights, lse, key, last, out, rows, vocab, nucleus_role, roles, probabilities, BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
