"""The gated activation of the feed-forward block (SwiGLU and GeGLU, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

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
