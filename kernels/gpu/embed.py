"""The embeddings on a GPU: a program per row, which leaves the sums of its squares as `linear_add` does.

An id outside the table gives NaN: to refuse it would take waiting for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import sizes
from nudging.kernels.gpu.common.configs import config_of
from nudging.kernels.gpu.common.pdl import begin
from nudging.kernels.gpu.common.row import Row
from nudging.kernels.gpu.common.sums_of_squares import GROUP, groups_of, sums_of_squares
from nudging.kernels.linear_add import Stream


@triton.jit
def _embed(
    weight_ptr, ids_ptr, out_ptr, squares_ptr, vocab, dim, scale, inner, outer_stride, inner_stride,
    HAS_SQUARES: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row // inner * outer_stride + row % inner * inner_stride).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    known = inside & (token >= 0) & (token < vocab)
    x = tl.load(weight_ptr + token * dim + at, mask=known, other=float("nan"))
    x = (x.to(tl.float32) * scale).to(x.dtype)
    tl.store(out_ptr + row * dim + at, x, mask=inside)
    if HAS_SQUARES:
        y = tl.where(inside, x.to(tl.float32), 0.0)
        groups, g = tl.cdiv(dim, GROUP), tl.arange(0, BLOCK // GROUP)
        squares = tl.reshape(sums_of_squares(y, 1, BLOCK), [BLOCK // GROUP])
        tl.store(squares_ptr + row * groups + g, squares, mask=g < groups)


def embed(weight: Tensor, ids: Tensor, scale: float = 1.0) -> Stream:
    op, device = "embed", weight.device
    vocab, dim = sizes(op, "weight", weight, 2)
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() not in (1, 2) or ids.device != device:
        raise ValueError(
            f"{op}: ids are {tuple(ids.shape)} {ids.dtype} on {ids.device}, "
            f"not one or two dimensions of int32 or int64 on {device}"
        )
    weight = weight.contiguous()
    by_seq = ids if ids.dim() == 2 else ids[None]
    rows, config = ids.numel(), config_of(device)
    out = weight.new_empty(rows, dim)
    squares = (
        weight.new_empty((rows, groups_of(dim)), dtype=torch.float32) if config.leaves_squares(rows) else None
    )
    row = Row.of(op, max(dim, int(GROUP.value)))
    if rows > 0:
        _embed[(rows,)](
            weight, ids, out, out if squares is None else squares, vocab, dim, scale,
            by_seq.shape[1], by_seq.stride(0), by_seq.stride(1), squares is not None, config.pdl, row.block,
            **config.options(row.warps),
        )  # fmt: skip
    return Stream(out, squares)
