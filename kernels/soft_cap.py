"""Soft capping of logits (Gemma 2)."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, team
from .cuda import on_cuda
from .op import Op


@Op
def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in fp32, returned in the input's dtype and shape.  logits: [rows, vocab]."""
    return (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)


@soft_cap.impl("cpu", runs_on=lambda logits, cap: on_cpu(logits))
def _soft_cap_cpu(logits: Tensor, cap: float, isa: _C.Isa = BEST) -> Tensor:
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    _C.soft_cap(isa, team(), DTYPES[logits.dtype], logits.data_ptr(), out.data_ptr(), logits.numel(), cap)
    return out


soft_cap.impl_at(
    "triton", runs_on=lambda logits, cap: on_cuda(logits), at="nudging.kernels.gpu.soft_cap:soft_cap"
)
