"""From logits to a token: temperature and filters, then the largest of log-probability plus keyed noise."""

import math

import torch
from torch import Tensor

from .cuda import on_cuda
from .gumbel import gumbel_noise
from .op import Op

# A temperature below this is none: what is left of the noise then decides between equal logits alone, and
# logits divided by less would leave the range of fp32.
COLD = 2.0**-17


@Op
def warp(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The log-probabilities that are sampled from: [rows, vocab] fp32, -inf outside, each row summing to one.

    logits: [rows, vocab] fp32, the largest of each row finite.  In this order: divide by `temperature`, at
    least COLD; keep the `top_k` likeliest (0: all); of those, renormalised, keep a token where the likelier
    ones together have less than `top_p` (>= 1: all); keep tokens of at least `min_p` (0: all) times the
    likeliest one's probability; renormalise.  Equally likely tokens rank by id, lowest first; the likeliest
    one always stays.  A row's result does not depend on the other rows, bit for bit.
    """
    out = torch.empty_like(logits, dtype=torch.float32)
    # One row at a time and in fp64: the reductions of torch may sum rows of a matrix in another order.
    for i, row in enumerate(logits):
        out[i] = torch.log_softmax(_filtered(row.double() / temperature, top_k, top_p, min_p), dim=0)
    return out


@Op
def pick(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """The token id at output position `position`; ties go to the lowest id.

    logits: [vocab] fp32.  The argmax of the logits where `temperature` is below COLD, else of
    warp(logits, ...) + gumbel_noise(seed, position, vocab): a draw from exp(warp).  Where the largest logit
    is not finite, or one is NaN, there is nothing to pick: the token is any id, and the caller has to know
    (`nudging.executor.sampler` does).
    """
    if temperature < COLD:
        return int(logits.argmax())
    noise = gumbel_noise(seed, position, logits.shape[0]).to(logits.device)
    return int((warp(logits[None], temperature, top_k, top_p, min_p)[0] + noise).argmax())


pick.impl_at(
    "triton",
    runs_on=lambda logits, temperature, top_k, top_p, min_p, seed, position: on_cuda(logits),
    at="nudging.kernels.gpu.pick_rows:pick",
)


def _filtered(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """`scores` [vocab] fp64 with -inf wherever top-k, top-p or min-p removes the token."""
    if top_k == 0 and top_p >= 1 and min_p == 0:
        return scores
    ranked, ids = torch.sort(scores, descending=True, stable=True)
    if top_k > 0:
        ranked[top_k:] = -math.inf
    if top_p < 1:
        mass = torch.softmax(ranked, dim=0).cumsum(dim=0)
        ranked[1:][mass[:-1] >= top_p] = -math.inf
    if min_p > 0:
        ranked[ranked < ranked[0] + math.log(min_p)] = -math.inf
    return torch.empty_like(scores).scatter_(0, ids, ranked)
