"""The gate and up projections with the activation that joins them."""

from torch import Tensor

from .cpu import on_cpu
from .cuda import on_cuda
from .gated_act import gated_act
from .linear import linear
from .op import Op


@Op
def gated_linear(x: Tensor, weight: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """gated_act(linear(x, weight, bias), activation), with the bits of the two ops: [rows, dim].

    x: [rows, in]; weight: [2 * dim, in], gate first; bias: [2 * dim] or None; activation: as in gated_act.
    """
    return gated_act.reference(linear.reference(x, weight, bias), activation)


@gated_linear.impl("cpu", runs_on=lambda x, weight, activation, bias=None: on_cpu(x))
def _gated_linear_cpu(x: Tensor, weight: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    return gated_act(linear(x, weight, bias), activation)


gated_linear.impl_at(
    "triton",
    runs_on=lambda x, weight, activation, bias=None: on_cuda(x),
    at="nudging.kernels.gpu.gated_linear:gated_linear",
)
