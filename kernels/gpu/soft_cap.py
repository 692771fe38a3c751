"""Soft capping on a GPU: a program per block of elements."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.gpu.common.math import cap_logits

BLOCK = 1024


@triton.jit
def _soft_cap(x_ptr, out_ptr, count, cap, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, cap_logits(x, cap).to(out_ptr.dtype.element_ty), mask=at < count)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    if not cap > 0:
        raise ValueError(f"soft_cap: cap is {cap}, it must be above 0")
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    grid = (triton.cdiv(logits.numel(), BLOCK),)
    _soft_cap[grid](logits, out, logits.numel(), cap, BLOCK, num_warps=4, enable_fp_fusion=False)
    return out
