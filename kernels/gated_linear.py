"""The gate and up projections with the activation that joins them."""

from torch import Tensor

from .cpu import on_cpu
from .cuda import on_cuda
from .gated_act import gated_act
from .linear import linear, product
from .op import Op
from .rms_norm import Norm
from .weight import Weight


@Op
def gated_linear(
    x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    """gated_act(linear(x, weight, bias, norm=norm), activation), with the bits of the two ops: [rows, dim].

    x: [rows, in]; weight: [2 * dim, in], gate first; bias: [2 * dim] or None; activation: as in
    gated_act; norm: as in linear.
    """
    return gated_act.reference(product(x, weight, bias, norm).to(x.dtype), activation)


@gated_linear.impl("cpu", runs_on=lambda x, weight, activation, bias=None, norm=None: on_cpu(x))
def _gated_linear_cpu(
    x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    return gated_act(linear(x, weight, bias, norm=norm), activation)


gated_linear.impl_at(
    "triton",
    runs_on=lambda x, weight, activation, bias=None, norm=None: on_cuda(x),
    at="nudging.kernels.gpu.gated_linear:gated_linear",
)
