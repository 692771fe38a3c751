"""int8 weights become floats, four at a time by their bits: by a GPU's instructions, elsewhere by ptx.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from nudging.kernels.gpu.common.widen_int8 import widened
from tests.support.compare import per_dtype
from tests.support.interpreter import DEVICE

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@triton.jit
def _widen(values_ptr, out_ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, widened(tl.load(values_ptr + at), out_ptr.dtype.element_ty))


@per_dtype
def test_every_int8_is_widened_exactly(dtype: torch.dtype) -> None:
    """Each of them in each of the four places."""
    place = torch.arange(1024)
    values = ((place // 4 + place % 4 * 85) % 256 - 128).to(torch.int8).to(DEVICE)
    out = torch.full_like(values, float("nan"), dtype=dtype)
    _widen[(1,)](values, out, len(values))
    assert torch.equal(out, values.to(dtype))
