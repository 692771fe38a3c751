"""Sampling in Triton: its noise, its filters and what they leave, against the references in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.gpu.gumbel import gumbel_of, part_noise
from nudging.kernels.gumbel import gumbel_noise
from nudging.kernels.op import Op
from nudging.kernels.pick_rows import pick_rows
from nudging.kernels.sample import pick, warp
from tests.kernels.test_triton import on_device, pytestmark
from tests.support.cases import noise
from tests.support.interpreter import DEVICE

__all__ = ["pytestmark"]


def on_gpu(op: Op[..., Any]) -> Callable[..., Any]:
    return next(found.run for found in op.implementations if found.name == "triton")


@triton.jit
def _noise_of_bits(bits_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, gumbel_of(tl.load(bits_ptr + at).to(tl.uint32)))


@triton.jit
def _noise_of_rows(seed_ptr, position_ptr, out_ptr, parts, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    row, part = tl.arange(0, ROWS), tl.program_id(0) + tl.zeros([ROWS], tl.int32)
    found = part_noise(tl.load(seed_ptr + row), tl.load(position_ptr + row), part, LEVELS)
    at = (row[:, None] * parts + part[:, None] << LEVELS) + tl.arange(0, 1 << LEVELS)[None, :]
    tl.store(out_ptr + at, found)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Within the bound that kernels/gpu/gumbel.py states; want: fp64."""
    assert bool(got.isfinite().all())
    assert float(((got.double() - want).abs() / want.abs().clamp(min=1)).max()) <= 2.0**-21


def test_noise_is_right_for_the_smallest_and_largest_bits_and_between() -> None:
    powers = 2 ** np.arange(32)
    some = np.random.default_rng(0).integers(0, 2**32, 2**14 - 66)
    bits = np.concatenate([[0, 2**31 - 1], powers, 2**32 - powers, some]).astype(np.uint32)
    out = torch.empty(len(bits), device=DEVICE)
    _noise_of_bits[(1,)](torch.from_numpy(bits.astype(np.int64)).to(DEVICE), out, len(bits))
    lacks = ((~bits).astype(np.float64) + 0.5) * 2.0**-32
    assert_near(out.cpu(), torch.from_numpy(-np.log(-np.log1p(-lacks))))


def test_noise_of_a_row_is_that_of_its_seed_and_position() -> None:
    seed, position = torch.tensor([-5, 2**62 + 17]), torch.tensor([2**32 - 1, 3])
    out = torch.empty(2, 256, device=DEVICE)
    _noise_of_rows[(2,)](seed.to(DEVICE), position.to(DEVICE), out, 2, 2, 7)
    for i in (0, 1):
        assert_near(out[i].cpu(), gumbel_noise(int(seed[i]), int(position[i]), 256).double())


FILTERS = list(itertools.product([0, 1, 7, 50, 4000], [1.0, 0.9, 0.3, 0.0], [0.0, 0.1, 1.0]))


def rows_to_pick(vocab: int) -> tuple[Tensor, ...]:
    """A row for every combination of filters; among them some at temperature 0, with ties, of few tokens."""
    rows, randn = len(FILTERS), noise(3)
    logits = randn(rows, vocab) * 3
    logits[:, 3::7] = logits[:, 3:4]
    logits[2::8] = 0.0
    logits[5::8, 10:] = -math.inf
    temperature = randn(rows).abs() * 2 + 0.05
    temperature[::9] = 0.0
    top_k, top_p, min_p = (torch.tensor(one) for one in zip(*FILTERS, strict=True))
    seed = torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(3))
    return logits, temperature, top_k.int(), top_p, min_p, seed, torch.arange(rows) * 1000


def margins(logits: Tensor, temperature: Tensor, *filters: Tensor) -> Tensor:
    """By how much the best sum is ahead of the next, relative to the bound of pick_rows, in fp64; [rows]."""
    *filters_, seed, position = filters
    found = []
    for i, row in enumerate(logits):
        if temperature[i] == 0:
            found.append(math.inf)
            continue
        settings = [float(one[i]) for one in filters_]
        kept = warp(row[None], float(temperature[i]), int(settings[0]), *settings[1:])[0].double()
        drawn = kept + gumbel_noise(int(seed[i]), int(position[i]), len(row)).double()
        best, second = drawn.topk(2).values.tolist()
        scale = max(1.0, abs(float(row.max() / temperature[i])), abs(best))
        found.append((best - second) / (2.0**-18 * scale))
    return torch.tensor(found)


def test_picks_are_the_references_wherever_the_bound_promises_it() -> None:
    args = rows_to_pick(300)
    want = pick_rows.reference(*args)
    assert bool((margins(*args) > 1).all())
    got = on_gpu(pick_rows)(*on_device(args)).cpu()
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


def test_a_pick_depends_on_neither_its_neighbours_nor_which_op_draws_it() -> None:
    args = rows_to_pick(300)
    run = on_gpu(pick_rows)
    whole = run(*on_device(args)).cpu()
    shuffled = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(run(*on_device(tuple(one[shuffled] for one in args))).cpu(), whole[shuffled])
    for i in (1, 22, 40):
        seed = int(args[5][i]) + 2**64  # a seed is taken modulo 2^64
        one = [
            float(args[1][i]),
            int(args[2][i]),
            float(args[3][i]),
            float(args[4][i]),
            seed,
            int(args[6][i]),
        ]
        assert on_gpu(pick)(args[0][i].to(DEVICE), *one) == int(whole[i])


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_row_without_a_softmax_ends(top_p: float) -> None:
    """It is refused by its statistics; here it must only not go on for ever."""
    logits = torch.zeros(4, 40)
    logits[0], logits[1, 3], logits[2] = -math.inf, math.inf, math.nan
    logits[3, 7] = math.nan
    one = torch.ones(4)
    filters = (one, one.int() * 2, one * top_p, one * 0.1, one.long(), one.long())
    assert on_gpu(pick_rows)(*on_device((logits, *filters))).shape == (4,)


@pytest.mark.parametrize("temperature", [2.0**-17, 1e-6, 1e-30, 1e-40, 2.0**-149])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (3, 0.5, 0.1)])
def test_the_least_temperatures_pick_the_likeliest(
    temperature: float, filters: tuple[int, float, float]
) -> None:
    """Logits / temperature would leave the range of fp32, and all that do would be one."""
    rows = torch.randn(6, 300, generator=torch.Generator().manual_seed(4)) * 20
    rows[4] -= 1000
    rows[5, 7:] = -math.inf
    one = torch.ones(6)
    k, p, m = filters
    settings = (one * temperature, one.int() * k, one * p, one * m, one.long(), torch.arange(6))
    want = rows.argmax(dim=1).int()
    assert torch.equal(pick_rows.reference(rows, *settings), want)
    assert torch.equal(on_gpu(pick_rows)(*on_device((rows, *settings))).cpu(), want)


@pytest.mark.parametrize("top_p", [2.0**-149, 1e-20])
@pytest.mark.parametrize("min_p", [0.0, 2.0**-149, 1.0])
def test_the_least_filters_keep_the_likeliest(top_p: float, min_p: float) -> None:
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(5))
    one = torch.ones(4)
    settings = (one * 100, one.int() * 0, one * top_p, one * min_p, one.long(), torch.arange(4))
    want = rows.argmax(dim=1).int()
    assert torch.equal(pick_rows.reference(rows, *settings), want)
    assert torch.equal(on_gpu(pick_rows)(*on_device((rows, *settings))).cpu(), want)


def test_among_equal_logits_the_coldest_pick_is_one_on_all_devices() -> None:
    rows = torch.zeros(3, 200)
    one = torch.ones(3)
    settings = (one * 1e-12, one.int() * 0, one, one * 0, torch.arange(3), torch.arange(3))
    assert pick_rows.reference(rows, *settings).tolist() == [0, 0, 0]
    assert on_gpu(pick_rows)(*on_device((rows, *settings))).tolist() == [0, 0, 0]
