"""Matrix product with a weight: the op that reads almost all bytes of a step."""

from torch import Tensor

from .op import Op


@Op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in fp32, returned in x's dtype: [rows, out].

    x: [rows, in]; weight: [out, in] of x's dtype; bias: [out] of x's dtype or None.
    """
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
