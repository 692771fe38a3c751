"""Rotary position embedding (arXiv 2104.09864), the half-split layout of Llama checkpoints."""

import torch
from torch import Tensor

from nudging import _C

from .cpu import BEST, DTYPES, on_cpu, require, sizes, team
from .cuda import on_cuda
from .op import Op


@Op
def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) by the angle of the row's position, in fp32; x's dtype.

    x: [rows, heads, head_dim]; positions: [rows] int64; cos, sin: [max_position, half] fp32 tables, already
    scaled.  2 * half <= head_dim; the channels from 2 * half on pass unchanged (partial rotary).
    """
    half = cos.shape[1]
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


@rope.impl("cpu", runs_on=lambda x, positions, cos, sin: on_cpu(x))
def _rope_cpu(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, isa: _C.Isa = BEST) -> Tensor:
    rows, heads, head_dim = sizes("rope", "x", x, 3)
    max_position, half = sizes("rope", "cos", cos, 2)
    x = x.contiguous()
    positions = require("rope", "positions", positions, (rows,), torch.int64)
    cos = require("rope", "cos", cos, (max_position, half), torch.float32)
    sin = require("rope", "sin", sin, (max_position, half), torch.float32)
    out = torch.empty_like(x)
    _C.rope(
        isa,
        team(),
        DTYPES[x.dtype],
        x.data_ptr(),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        head_dim,
        half,
        max_position,
    )
    return out


rope.impl_at(
    "triton",
    runs_on=lambda x, positions, cos, sin: on_cuda(x),
    at="nudging.kernels.gpu.rope:rope",
)
