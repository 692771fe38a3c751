"""What a policy asks of a row of logits, in one pass: maximum, log-sum-exp, argmax and entropy."""

from typing import NamedTuple

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, sizes, team
from .cuda import on_cuda
from .op import Op


class SoftmaxStats(NamedTuple):
    """Per row: `max`, `lse` (top-1 probability = exp(max - lse)), `entropy` (nats) fp32; `argmax` int32."""

    max: Tensor
    lse: Tensor
    argmax: Tensor
    entropy: Tensor


@Op
def softmax_stats(logits: Tensor) -> SoftmaxStats:
    """The statistics of softmax(logits) per row, in fp32; ties of the argmax go to the lowest id.

    logits: [rows, vocab] of any float dtype.  Entries of -inf have probability 0; a NaN anywhere in a row
    makes that row's max and lse NaN.
    """
    x = logits.float()
    lse = torch.logsumexp(x, dim=-1)
    top, argmax = x.max(dim=-1)
    p = torch.exp(x - lse[:, None])
    expected = torch.where(p > 0, p * x, torch.zeros_like(x)).sum(dim=-1)
    return SoftmaxStats(top, lse, argmax.int(), lse - expected)


@softmax_stats.impl("cpu", runs_on=lambda logits: on_cpu(logits))
def _softmax_stats_cpu(logits: Tensor, isa: _C.Isa = BEST) -> SoftmaxStats:
    rows, vocab = sizes("softmax_stats", "logits", logits, 2)
    logits = logits.contiguous()
    top = logits.new_empty(rows, dtype=torch.float32)
    lse, entropy = torch.empty_like(top), torch.empty_like(top)
    argmax = logits.new_empty(rows, dtype=torch.int32)
    _C.softmax_stats(
        isa,
        team(),
        DTYPES[logits.dtype],
        logits.data_ptr(),
        top.data_ptr(),
        lse.data_ptr(),
        argmax.data_ptr(),
        entropy.data_ptr(),
        rows,
        vocab,
    )
    return SoftmaxStats(top, lse, argmax, entropy)


softmax_stats.impl_at(
    "triton", runs_on=lambda logits: on_cuda(logits), at="nudging.kernels.gpu.softmax_stats:softmax_stats"
)
