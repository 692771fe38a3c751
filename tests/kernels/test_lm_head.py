"""The fused head has the bits of the ops that it fuses, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nudging.kernels.lm_head import ARGMAX, LINES, LSE, MAX, TOKEN, lm_head
from nudging.kernels.rms_norm import Norm
from nudging.kernels.sample import pick
from nudging.kernels.weight import quantize_int8
from tests.kernels.test_triton import on_device, pytestmark, triton
from tests.support.cases import Args, noise
from tests.support.compare import take
from tests.support.interpreter import DEVICE

__all__ = ["pytestmark"]

# What has an entry for each row that is answered.
BY_ROW = (4, 5, 6, 7)


# A GPU has the time for the sizes of a real model, too.
REAL = [(16, 0.0, True), (70, 30.0, True)] if DEVICE == "cuda" else []


def head_args(
    rows: int, dtype: torch.dtype, cap: float = 0.0, hidden: int = 72, held: int = 400, vocab: int = 389
) -> Args:
    """A weight with more rows than tokens; every third row at temperature 0, the last of x not answered."""
    randn = noise(rows)
    x, weight = randn(rows + 1, hidden, dtype=dtype), randn(held, hidden, dtype=dtype)
    temperature = randn(rows).abs() + 0.1
    temperature[::3] = 0.0
    generator = torch.Generator().manual_seed(rows)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return x, weight, vocab, cap, temperature, seed, torch.arange(rows) + 2**31, torch.arange(rows).flip(0)


def one_by_one(args: Args) -> Tensor:
    """What the head's parts give in Triton."""
    x, weight, vocab, cap, temperature, seed, position, rows, *norm = on_device(args)
    x = x[rows]
    if norm:
        x = triton("rms_norm")(x, *norm[0][:3])
    logits = triton("linear")(x, weight, None, torch.float32)
    if cap > 0:
        logits = triton("soft_cap")(logits, cap)
    logits = logits[:, :vocab]
    off = torch.zeros_like(temperature)
    token = triton("pick_rows")(logits.contiguous(), temperature, off.int(), off + 1, off, seed, position)
    stats = triton("softmax_stats")(logits)
    said = {TOKEN: token, ARGMAX: stats.argmax, MAX: stats.max, LSE: stats.lse}
    return torch.stack([said[line].view(torch.int32) for line in range(LINES)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(("rows", "cap", "real"), [(3, 0.0, False), (20, 20.0, False), *REAL])
def test_the_fused_head_has_the_bits_of_its_parts(
    rows: int, cap: float, real: bool, int8: bool, dtype: torch.dtype
) -> None:
    x, weight, *rest = head_args(rows, dtype, cap, *((2048, 151936, 151665) if real else ()))
    args = (x, quantize_int8(weight) if int8 else weight, *rest)
    fused = triton("lm_head")(*on_device(args))
    assert torch.equal(fused, one_by_one(args))
    for part in (slice(0, 1), slice(2, rows)):
        alone = triton("lm_head")(*on_device(take(args, BY_ROW, part)))
        assert torch.equal(alone, fused[:, part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_norm_within_the_head_has_the_bits_of_rms_norm(unit_offset: bool, dtype: torch.dtype) -> None:
    """With the sums of squares that the product before left, and without, as many rows have it."""
    randn = noise(3)
    _, weight, *rest = head_args(5, dtype)
    stream = triton("linear_add")(*on_device((randn(6, 8, dtype=dtype), randn(72, 8, dtype=dtype),
                                              randn(6, 72, dtype=dtype))))  # fmt: skip
    assert stream.squares is not None
    scale = randn(72, dtype=dtype).to(DEVICE)
    want = one_by_one((stream.x, weight, *rest, Norm(scale, 1e-5, unit_offset)))
    for squares in (stream.squares, None):
        norm = Norm(scale, 1e-5, unit_offset, squares)
        assert torch.equal(triton("lm_head")(stream.x, *on_device((weight, *rest)), norm), want)


def test_the_head_says_it_where_it_is_told_to() -> None:
    args = on_device(head_args(3, torch.float32))
    memory = torch.full((LINES, 5, 3), -7, dtype=torch.int32, device=DEVICE)
    for head in (lm_head.reference, triton("lm_head")):
        assert head(*args, None, memory[:, 2]).data_ptr() == memory[:, 2].data_ptr()
        assert torch.equal(memory[:, 2], head(*args))
    assert bool((memory[:, [0, 1, 3, 4]] == -7).all())
    with pytest.raises(ValueError, match=r"lm_head: out is \(4, 2\)"):
        triton("lm_head")(*args, None, memory[:, 0, :2])


def test_the_head_of_no_rows_is_empty() -> None:
    assert triton("lm_head")(*on_device(head_args(0, torch.float32))).shape == (LINES, 0)


def test_a_vocabulary_that_the_weight_does_not_have_is_refused() -> None:
    x, weight, _, *rest = on_device(head_args(2, torch.float32))
    with pytest.raises(ValueError, match="vocab is 401; the weight has rows for 1 to 400 tokens"):
        triton("lm_head")(x, weight, 401, *rest)


@pytest.mark.skipif(bool(pytestmark), reason="the CPU's composition; this run is the GPU's")
def test_on_a_cpu_the_head_is_the_composition_of_its_parts() -> None:
    args = head_args(7, torch.float32, 20.0)
    found = lm_head(*args)
    x, weight, vocab, cap, temperature, seed, position, rows = args
    logits = cap * torch.tanh(x[rows] @ weight[:vocab].T / cap)
    torch.testing.assert_close(found[LSE].view(torch.float32), torch.logsumexp(logits, 1))
    torch.testing.assert_close(found[MAX].view(torch.float32), logits.amax(1))
    for i, row in enumerate(logits):
        one = pick(row, float(temperature[i]), 0, 1.0, 0.0, int(seed[i]), int(position[i]))
        assert int(found[TOKEN, i]) == one
        assert int(found[ARGMAX, i]) == int(row.argmax())
