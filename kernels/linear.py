"""Matrix product with a weight: the op that reads almost all bytes of a step."""

import torch
from torch import Tensor

from .op import Op


@Op
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x @ weight.T + bias, accumulated in fp32: [rows, out] of `out_dtype` (x's dtype when None).

    x: [rows, in]; weight: [out, in] of x's dtype; bias: [out] of x's dtype or None.  `out_dtype` is x's dtype
    or fp32: the LM head asks for fp32 so that bf16 rounding does not make ties among logits.
    """
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype or x.dtype)
