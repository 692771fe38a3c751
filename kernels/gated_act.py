"""The gated activation of the feed-forward block (SwiGLU and GeGLU, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, sizes, team
from .cuda import on_cuda
from .op import Op


@Op
def gated_act(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up in fp32, returned in the input's dtype: [rows, dim].

    gate_up: [rows, 2 * dim], gate first; activation: "silu", "gelu" (erf) or "gelu_tanh".
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        gate = F.silu(gate)
    else:
        gate = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (gate * up).to(gate_up.dtype)


ACTIVATIONS = {
    "silu": _C.Activation.silu,
    "gelu": _C.Activation.gelu,
    "gelu_tanh": _C.Activation.gelu_tanh,
}


@gated_act.impl("cpu", runs_on=lambda gate_up, activation: on_cpu(gate_up))
def _gated_act_cpu(gate_up: Tensor, activation: str, isa: _C.Isa = BEST) -> Tensor:
    rows, both = sizes("gated_act", "gate_up", gate_up, 2)
    if both % 2 != 0:
        raise ValueError(f"gated_act: {both} columns do not halve into gate and up")
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_act: activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(rows, both // 2)
    _C.gated_act(
        isa,
        team(),
        DTYPES[gate_up.dtype],
        ACTIVATIONS[activation],
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        both // 2,
    )
    return out


gated_act.impl_at(
    "triton",
    runs_on=lambda gate_up, activation: on_cuda(gate_up),
    at="nudging.kernels.gpu.gated_act:gated_act",
)
