"""Several models' logits as one: the target that collaborative decoding samples from."""

import math

import torch
from torch import Tensor

from .cuda import on_cuda
from .op import Op
from .softmax_stats import softmax_stats


@Op
def mix_logits(
    logits: Tensor,
    weights: Tensor,
    probabilities: bool,
    nucleus_role: int,
    nucleus_p: Tensor,
    nucleus_temperature: Tensor,
) -> Tensor:
    """The mixture of the roles' rows: [rows, vocab] fp32 logits, to be given to softmax_stats and pick_rows.

    logits: [roles, rows, vocab] fp32; weights: [roles, rows] fp32.  With h_i the logits of role i:

    probabilities False: sum_i w_i h_i, each product and sum rounded to fp32, in the order of the roles.  This
    is DeRa, arXiv 2402.02992 (w = lambda, 1 - lambda over aligned, reference); proxy tuning, 2401.08565 (1,
    alpha, -alpha over base, tuned, plain); linear alignment, 2401.11458 (1 + r, -r over with and without the
    principle); and every geometric mixture prod_i p_i^w_i, whose logs differ from this by a constant.
    probabilities True: log sum_i w_i softmax(h_i), weights at least 0 (BlendIn, 2606.11201: 1 - a, a).

    A role of weight 0 counts for nothing; a token that is -inf for another one stays out.  Then only the
    nucleus of role `nucleus_role` is kept, the rest is -inf: those tokens whose likelier ones have together
    less than nucleus_p of softmax(h / nucleus_temperature); equally likely ones rank by id, the likeliest
    stays.  nucleus_p: [rows] fp32, 1 and above for no mask; nucleus_temperature: [rows] fp32, above 0.

    On a GPU a nucleus is the reference's unless its mass is within 2^-16 of nucleus_p.
    """
    used = weights[:, :, None] != 0
    if probabilities:
        lse = torch.stack([softmax_stats(one).lse for one in logits])
        shares = torch.where(used, weights[:, :, None] * torch.exp(logits - lse[:, :, None]), 0.0)
    else:
        shares = torch.where(used, weights[:, :, None] * logits, 0.0)
    mixed = shares[0]
    for share in shares[1:]:
        mixed = mixed + share
    if probabilities:
        mixed = torch.log(mixed)
    else:
        mixed = mixed.masked_fill((used & (logits == -math.inf)).any(dim=0), -math.inf)
    return mixed.masked_fill(_outside(logits[nucleus_role], nucleus_p, nucleus_temperature), -math.inf)


def _outside(logits: Tensor, p: Tensor, temperature: Tensor) -> Tensor:
    """Which tokens [rows, vocab] are not in the nucleus of their row."""
    ranked, ids = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    mass = torch.softmax(ranked / temperature.double()[:, None], dim=-1).cumsum(dim=-1)
    removed = torch.zeros_like(mass, dtype=torch.bool)
    removed[:, 1:] = mass[:, :-1] >= p.double()[:, None]
    removed &= (p < 1)[:, None]
    return torch.zeros_like(removed).scatter_(-1, ids, removed)


mix_logits.impl_at(
    "triton",
    runs_on=lambda logits, weights, probabilities, nucleus_role, nucleus_p, nucleus_temperature: on_cuda(
        logits
    ),
    at="nudging.kernels.gpu.mix_logits:mix_logits",
)
