"""What the Triton attention promises beyond its reference: a row's bits are a function of that row alone."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from nudging.kernels.cuda import ARRIVALS
from nudging.kernels.paged_attention import paged_attention
from tests.kernels.test_triton import on_device, pytestmark, triton
from tests.support.cases import Args, Attention, noise, page
from tests.support.compare import assert_same_bits
from tests.support.interpreter import DEVICE

__all__ = ["pytestmark"]

per_16_and_32_bits = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# A program takes one split, or all of them; the last of those with one merges, or a launch of its own.
RUNS = [functools.partial(triton("paged_attention"), enough_programs=n) for n in (10**9, 0)]
ARRIVED = torch.zeros(ARRIVALS, dtype=torch.int32, device=DEVICE)
COUNTED = functools.partial(RUNS[0], arrivals=ARRIVED)


def attended(run: functools.partial[Tensor], args: Args) -> Tensor:
    return run(*on_device(args)).cpu()


# Heads, key-value heads, head_dim, window, soft cap; a GPU has the time for the sizes of real models, too.
SMALL = [(2, 1, 24, 0, 0.0), (2, 2, 24, 100, 0.0), (3, 1, 24, 13, 10.0)]
REAL = [(14, 2, 64, 0, 0.0), (32, 32, 96, 0, 0.0), (32, 8, 128, 100, 0.0), (16, 8, 256, 0, 50.0)]


@per_16_and_32_bits
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "soft_cap"), SMALL + (REAL if DEVICE == "cuda" else [])
)
def test_bits_depend_on_neither_chunks_nor_blocks_nor_splits_nor_other_sequences(
    heads: int, kv_heads: int, head_dim: int, window: int, soft_cap: float, dtype: torch.dtype
) -> None:
    length, randn = 290, noise(heads)  # two splits
    q, k, v = (randn(length, n, head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))

    def attend(run: functools.partial[Tensor], start: int, end: int, others: list[int], size: int) -> Tensor:
        queries = [*(randn(1, heads, head_dim, dtype=dtype) for _ in others), q[start:end]]
        keys, values = (
            [*(randn(n, kv_heads, head_dim, dtype=dtype) for n in others), x[:end]] for x in (k, v)
        )
        rows = torch.tensor([0, *map(len, queries)]).cumsum(0).int()
        lengths = torch.tensor([len(one) for one in keys], dtype=torch.int32)
        args = (torch.cat(queries), *page(keys, values, size, start), rows, lengths, 0.2, window, soft_cap)
        return attended(run, args)[len(others) :]

    one_by_one, all_in_one = RUNS
    chunks = [(200, 203, [5], 16), (203, 204, [], 7), (250, 266, [1, 70], 64), (270, 279, [], 1)]
    whole = attend(all_in_one, 200, 290, [], 16)
    for run in (one_by_one, all_in_one, COUNTED):
        for start, end, others, size in [*chunks, (289, 290, [300], 16)]:
            got = attend(run, start, end, others, size)
            assert_same_bits([got], [whole], slice(start - 200, end - 200))
    assert not ARRIVED.any()


@per_16_and_32_bits
def test_bits_of_a_head_do_not_depend_on_its_group(dtype: torch.dtype) -> None:
    q, *rest = Attention((270, 5), (2, 1), heads=7, kv_heads=1)(6, dtype)
    whole = attended(RUNS[0], (q, *rest))
    for head in (0, 3, 6):
        assert_same_bits([attended(RUNS[0], (q[:, head : head + 1], *rest))], [whole[:, head : head + 1]])


@pytest.mark.parametrize("run", RUNS)
def test_blocks_that_the_window_has_left_are_not_looked_at(run: functools.partial[Tensor]) -> None:
    args = Attention((300,), (5,), window=20)(4, torch.float32)
    want = attended(run, args)
    args[3][0, : (295 - 19) // 16] = 2_147_480_000
    assert_same_bits([attended(run, args)], [want])


def test_a_query_that_is_a_slice_of_a_projection_is_read_where_it_lies() -> None:
    q, *rest = Attention((70, 5), (4, 1), heads=3, kv_heads=1)(1, torch.float32)
    fused = torch.cat((q, torch.full_like(q, float("nan"))), dim=1)
    assert_same_bits([attended(RUNS[0], (fused[:, :3], *rest))], [attended(RUNS[0], (q, *rest))])


def test_what_does_not_fit_is_refused_by_name() -> None:
    q, k, v, *rest = Attention((40, 9), (2, 1))(0, torch.float32)
    with pytest.raises(ValueError, match=r"paged_attention: v_cache is .* not .*float32"):
        attended(RUNS[0], (q, k, v.bfloat16(), *rest))
    with pytest.raises(ValueError, match="window is -1"):
        attended(RUNS[0], (q, k, v, *rest[:-2], -1, 0.0))
    assert paged_attention.chosen(q.double(), k, v, *rest) == "reference"


@per_16_and_32_bits
def test_what_is_not_finite_in_later_tokens_does_not_reach_earlier_rows(dtype: torch.dtype) -> None:
    args = Attention((40,), (9,), heads=2, kv_heads=1)(3, dtype)
    want = attended(RUNS[0], args)
    at = int(args[3][0, 36 // 16]) * 16 + 36 % 16
    for cache, value in ((args[1], "nan"), (args[2], "nan"), (args[2], "inf")):
        sound = cache.flatten(0, 1)[at].clone()
        cache.flatten(0, 1)[at, 0, 5] = float(value)
        got = attended(RUNS[0], args)
        cache.flatten(0, 1)[at] = sound
        # Nine rows at 31..39: those from 36 on see it.
        assert_same_bits([got[:5]], [want[:5]])
        assert bool(got[5:].isnan().any(dim=-1).all())
