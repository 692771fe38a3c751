"""The final projection with what is asked of its logits, which then need not be written."""

import torch
from torch import Tensor

from .cuda import on_cuda
from .linear import linear
from .op import Op
from .pick_rows import pick_rows
from .rms_norm import Norm, rms_norm
from .soft_cap import soft_cap
from .softmax_stats import softmax_stats
from .weight import Weight

# The lines of what is said: the token picked, the likeliest one, and the bits of max and lse, which are fp32.
TOKEN, ARGMAX, MAX, LSE = range(4)
LINES = 4


@Op
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
    """What softmax_stats says of cap * tanh(x[rows] @ weight.T / cap), and a token: [LINES, n] int32.

    x: [any, hidden], normalised first where there is a norm; rows: [n] int64, those of x that are answered;
    weight: [>= vocab, hidden] as in linear, of which the first `vocab` rows are tokens; the logits are fp32;
    cap: 0 for none.  temperature: [n] fp32, at least 0; seed, position: [n] int64.  The token is that of
    pick_rows, without filters; ties and rounding are as there and in softmax_stats.  `out`, where given, is
    what is written and returned; its lines are dense, wherever they lie.

    This is the composition of rms_norm, linear, soft_cap, softmax_stats and pick_rows, and on one device it
    has their bits: rows whose logits are needed may take those ops, their neighbours this one.
    """
    x = x[rows]
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, norm.unit_offset)
    logits = linear(x, weight, None, torch.float32)[:, :vocab].contiguous()
    if cap > 0:
        logits = soft_cap(logits, cap)
    off = torch.zeros_like(temperature)
    token = pick_rows(logits, temperature, off.int(), off + 1, off, seed, position)
    stats = softmax_stats(logits)
    said = torch.stack([token, stats.argmax, stats.max.view(torch.int32), stats.lse.view(torch.int32)])
    return said if out is None else out.copy_(said)


lm_head.impl_at("triton", runs_on=lambda x, *_, **__: on_cuda(x), at="nudging.kernels.gpu.lm_head:lm_head")
