"""The final projection with what is asked of its logits, which then need not be written."""

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import on_cuda
from .linear import linear
from .op import Op
from .pick_rows import pick_rows
from .soft_cap import soft_cap
from .softmax_stats import softmax_stats
from .weight import Weight


class LmHead(NamedTuple):
    """Per row: `max`, `lse`, `argmax`, `entropy` as in SoftmaxStats; `token`, the one picked, int32."""

    max: Tensor
    lse: Tensor
    argmax: Tensor
    entropy: Tensor
    token: Tensor


@Op
def lm_head(
    x: Tensor,
    weight: Weight,
    vocab: int,
    cap: float,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
) -> LmHead:
    """softmax_stats of cap * tanh(x @ weight.T / cap), and a token: five tensors of [rows].

    x: [rows, hidden]; weight: [>= vocab, hidden] as in linear, of which the first `vocab` rows are tokens;
    the logits are fp32; cap: 0 for none.  temperature: [rows] fp32, at least 0; seed, position: [rows] int64.
    The token is that of pick_rows, without filters; ties and rounding are as there and in softmax_stats.

    This is the composition of linear, soft_cap, softmax_stats and pick_rows, and on one device it has their
    bits: rows whose logits are needed may take those ops, their neighbours this one.
    """
    logits = linear(x, weight, None, torch.float32)[:, :vocab].contiguous()
    if cap > 0:
        logits = soft_cap(logits, cap)
    off = torch.zeros_like(temperature)
    token = pick_rows(logits, temperature, off.int(), off + 1, off, seed, position)
    return LmHead(*softmax_stats(logits), token)


lm_head.impl_at(
    "triton",
    runs_on=lambda x, weight, vocab, cap, temperature, seed, position: on_cuda(x),
    at="nudging.kernels.gpu.lm_head:lm_head",
)
