"""The fused head has the bits of the ops that it fuses, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nudging.kernels.lm_head import lm_head
from nudging.kernels.sample import pick
from nudging.kernels.weight import quantize_int8
from tests.cases import Args, noise
from tests.compare import assert_same_bits, take
from tests.interpreter import DEVICE
from tests.test_triton import on_device, pytestmark, triton

__all__ = ["pytestmark"]

BY_ROW = (0, 4, 5, 6)


# A GPU has the time for the sizes of a real model, too.
REAL = [(16, 0.0, True), (70, 30.0, True)] if DEVICE == "cuda" else []


def head_args(
    rows: int, dtype: torch.dtype, cap: float = 0.0, hidden: int = 72, held: int = 400, vocab: int = 389
) -> Args:
    """A weight with more rows than tokens; every third row at temperature 0."""
    randn = noise(rows)
    x, weight = randn(rows, hidden, dtype=dtype), randn(held, hidden, dtype=dtype)
    temperature = randn(rows).abs() + 0.1
    temperature[::3] = 0.0
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(rows))
    return x, weight, vocab, cap, temperature, seed, torch.arange(rows) + 2**31


def one_by_one(args: Args) -> list[Tensor]:
    """What the head's parts give in Triton."""
    x, weight, vocab, cap, temperature, seed, position = on_device(args)
    logits = triton("linear")(x, weight, None, torch.float32)
    if cap > 0:
        logits = triton("soft_cap")(logits, cap)
    logits = logits[:, :vocab]
    off = torch.zeros_like(temperature)
    token = triton("pick_rows")(logits.contiguous(), temperature, off.int(), off + 1, off, seed, position)
    return [one.cpu() for one in (*triton("softmax_stats")(logits), token)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(("rows", "cap", "real"), [(3, 0.0, False), (20, 20.0, False), *REAL])
def test_the_fused_head_has_the_bits_of_its_parts(
    rows: int, cap: float, real: bool, int8: bool, dtype: torch.dtype
) -> None:
    x, weight, *rest = head_args(rows, dtype, cap, *((2048, 151936, 151665) if real else ()))
    args = (x, quantize_int8(weight) if int8 else weight, *rest)
    fused = [one.cpu() for one in triton("lm_head")(*on_device(args))]
    assert_same_bits(fused, one_by_one(args))
    for part in (slice(0, 1), slice(2, rows)):
        alone = [one.cpu() for one in triton("lm_head")(*on_device(take(args, BY_ROW, part)))]
        assert_same_bits(alone, fused, part)


def test_the_head_of_no_rows_is_empty() -> None:
    assert [len(one) for one in triton("lm_head")(*on_device(head_args(0, torch.float32)))] == [0] * 5


def test_a_vocabulary_that_the_weight_does_not_have_is_refused() -> None:
    x, weight, _, *rest = on_device(head_args(2, torch.float32))
    with pytest.raises(ValueError, match="vocab is 401; the weight has rows for 1 to 400 tokens"):
        triton("lm_head")(x, weight, 401, *rest)


@pytest.mark.skipif(bool(pytestmark), reason="the CPU's composition; this run is the GPU's")
def test_on_a_cpu_the_head_is_the_composition_of_its_parts() -> None:
    args = head_args(7, torch.float32, 20.0)
    found = lm_head(*args)
    x, weight, vocab, cap, temperature, seed, position = args
    logits = cap * torch.tanh(x @ weight[:vocab].T / cap)
    torch.testing.assert_close(found.lse, torch.logsumexp(logits, 1))
    for i, row in enumerate(logits):
        one = pick(row, float(temperature[i]), 0, 1.0, 0.0, int(seed[i]), int(position[i]))
        assert int(found.token[i]) == one
        assert int(found.argmax[i]) == int(row.argmax())
