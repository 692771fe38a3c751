"""The pick of every row of a batch, each with parameters of its own."""

import torch
from torch import Tensor

from .cuda import on_cuda
from .op import Op
from .sample import pick


@Op
def pick_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """pick of each row of logits [rows, vocab] fp32, with parameters of its own: [rows] int32.

    temperature, top_p, min_p: [rows] fp32; top_k: [rows] int32; seed, position: [rows] int64.

    On a GPU the noise is within 2^-21 * max(1, |noise|) of the reference's, and logits / temperature and the
    masses that top-p adds up are fp32: the token is the reference's unless the two best sums of logits /
    temperature and noise are within 2^-18 of the larger one, or a mass within 2^-16 of `top_p`, or a logit
    within as much of the last one that `min_p` keeps.  There logits beyond 2^111 may be infinite once they
    are divided.
    """
    settings = (temperature, top_k, top_p, min_p, seed, position)
    choices = zip(logits, *(setting.tolist() for setting in settings), strict=True)
    return torch.tensor([pick(*choice) for choice in choices], dtype=torch.int32, device=logits.device)


pick_rows.impl_at(
    "triton",
    runs_on=lambda logits, temperature, top_k, top_p, min_p, seed, position: on_cuda(logits),
    at="nudging.kernels.gpu.pick_rows:pick_rows",
)
