"""A product that goes into the residual stream: the output projection, the down projection."""

from typing import NamedTuple

from torch import Tensor

from .cpu import on_cpu
from .cuda import on_cuda
from .linear import linear, product
from .op import Op
from .weight import Weight


class Stream(NamedTuple):
    """The residual stream [rows, dim], and what its norm can start from, if anything: see `Norm.squares`."""

    x: Tensor
    squares: Tensor | None


@Op
def linear_add(
    x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, arrivals: Tensor | None = None
) -> Stream:
    """residual + linear(x, weight, bias), with the bits of the two: a Stream of x's dtype.

    x: [rows, in]; weight, bias: as in linear; residual: [rows, out] of x's dtype.  `arrivals`: see cuda.py.
    """
    return Stream(residual + product(x, weight, bias, None).to(x.dtype), None)


@linear_add.impl("cpu", runs_on=lambda x, weight, residual, bias=None, arrivals=None: on_cpu(x))
def _linear_add_cpu(
    x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, arrivals: Tensor | None = None
) -> Stream:
    return Stream(residual + linear(x, weight, bias), None)


linear_add.impl_at(
    "triton",
    runs_on=lambda x, weight, residual, bias=None, arrivals=None: on_cuda(x),
    at="nudging.kernels.gpu.linear_add:linear_add",
)
