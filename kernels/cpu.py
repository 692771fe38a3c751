"""What the C++ implementations of all ops share: where they run, and on which instruction set."""

import os

import torch
from torch import Tensor

# torch first: the OpenMP runtime that it brings then serves nudging._C as well.
from nudging import _C

from .check import require, sizes

__all__ = ["BEST", "DTYPES", "choose_isa", "on_cpu", "require", "sizes"]

DTYPES = {torch.float32: _C.DType.f32, torch.bfloat16: _C.DType.bf16, torch.float16: _C.DType.f16}


def choose_isa(wanted: str) -> _C.Isa:
    """The instruction set of that name, the best one for ""; ValueError if this machine lacks it."""
    isas = {isa.name: isa for isa in _C.available_isas()}
    if wanted and wanted not in isas:
        raise ValueError(f"NUDGING_ISA is {wanted!r}; this processor and build have {', '.join(isas)}")
    return isas[wanted] if wanted else next(iter(isas.values()))


# Debugging only: NUDGING_ISA = portable, avx2, avx512 or avx512bf16 takes another set than the best.
BEST = choose_isa(os.environ.get("NUDGING_ISA", ""))


def on_cpu(x: Tensor) -> bool:
    """Whether the C++ kernels take `x`: a CPU tensor of fp32, bf16 or fp16."""
    return x.is_cpu and x.dtype in DTYPES
