"""The gated activation on a GPU: a program per block of a row."""

import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import sizes
from nudging.kernels.gpu.common.math import activate

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024


@triton.jit
def _gated_act(gate_up_ptr, out_ptr, dim, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * dim + at, mask=at < dim, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * dim + at, mask=at < dim, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * dim + at, y.to(out_ptr.dtype.element_ty), mask=at < dim)


def check_activation(op: str, activation: str) -> None:
    """ValueError unless the kernels know an activation of that name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")


def gated_act(gate_up: Tensor, activation: str) -> Tensor:
    rows, both = sizes("gated_act", "gate_up", gate_up, 2)
    if both % 2 != 0:
        raise ValueError(f"gated_act: {both} columns do not halve into gate and up")
    check_activation("gated_act", activation)
    gate_up = gate_up.contiguous()
    dim = both // 2
    out = gate_up.new_empty(rows, dim)
    grid = (rows, triton.cdiv(dim, BLOCK))
    _gated_act[grid](gate_up, out, dim, activation, BLOCK, num_warps=4, enable_fp_fusion=False)
    return out
