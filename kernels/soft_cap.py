"""Soft capping of logits (Gemma 2)."""

import torch
from torch import Tensor

from .op import Op


@Op
def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in fp32, returned in the input's dtype and shape.  logits: [rows, vocab]."""
    return (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)
