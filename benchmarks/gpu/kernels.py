"""Two kernels that only measure: one reads memory and does nothing else, one does nothing."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _read(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + at, mask=at < size, other=0), 0)
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit
def _nothing(x_ptr):
    pass


def read(x: Tensor, out: Tensor) -> None:
    """Read x, int32; what is written is the sum of each BLOCK of it, to `out`."""
    _read[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK, num_warps=8, enable_fp_fusion=False)


def nothing(x: Tensor) -> None:
    _nothing[(1,)](x, num_warps=1, enable_fp_fusion=False)
