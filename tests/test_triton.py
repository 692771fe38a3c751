"""Every Triton kernel against its op's reference, and the bits that it promises.

On a machine with a GPU the kernels run there (`make gpu`), elsewhere under Triton's interpreter: the same
cases, the same tolerances.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.cases import CASES, Args, Case, Make, linear_args, load, noise, rope_append_args
from tests.compare import (
    ROWWISE,
    Run,
    assert_fused_products_have_the_bits_of_what_they_fuse,
    assert_same_bits,
    assert_within,
    outputs,
    per_dtype,
    take,
    wanted,
)
from tests.interpreter import DEVICE
from tests.large import LARGE, LARGE_ROWS

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def triton(op: str) -> Run:
    """The op's Triton implementation."""
    return next(found.run for found in load(op).implementations if found.name == "triton")


def has_triton(op: str) -> bool:
    return any(found.name == "triton" for found in load(op).implementations)


def on_device(args: Args) -> Args:
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, args)  # type: ignore[no-any-return]


def computed(op: str, args: Args) -> list[Tensor]:
    """What the kernel gives for these arguments, on the CPU."""
    return [one.cpu() for one in outputs(op, triton(op), on_device(args))]


# Too long for the interpreter, which takes milliseconds for each step of a program.
LONG = {"softmax_stats-2x32001"}
AGREE = [case for case in CASES if has_triton(case.op) and str(case) not in LONG]
ROWS = [row for row in ROWWISE if has_triton(row[0])]
if DEVICE == "cuda":
    AGREE += [case for case in CASES if str(case) in LONG] + LARGE
    ROWS += LARGE_ROWS


@per_dtype
@pytest.mark.parametrize("case", AGREE, ids=str)
def test_triton_agrees_with_the_reference_in_fp64(case: Case, dtype: torch.dtype) -> None:
    args = case.make(0, dtype)
    for got, want in zip(computed(case.op, args), wanted(case, args), strict=True):
        assert_within(case, args, got, want)


@per_dtype
@pytest.mark.parametrize(("op", "make", "by_row"), ROWS)
def test_bits_of_a_row_do_not_depend_on_how_many_rows_and_where(
    op: str, make: Make, by_row: tuple[int, ...], dtype: torch.dtype
) -> None:
    args = on_device(make(1, dtype))
    whole = computed(op, args)
    for count in range(1, 18):
        rows = slice(count, 2 * count)
        assert_same_bits(computed(op, take(args, by_row, rows)), whole, rows)


@per_dtype
@pytest.mark.parametrize(("op", "make", "by_row"), ROWS)
def test_bits_of_a_row_do_not_depend_on_its_neighbours(
    op: str, make: Make, by_row: tuple[int, ...], dtype: torch.dtype
) -> None:
    args = on_device(make(2, dtype))
    whole = computed(op, args)
    count = len(args[0])
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    assert_same_bits(computed(op, take(args, by_row, shuffled.to(DEVICE))), whole, shuffled)
    poisoned = args[0].clone()
    poisoned[torch.arange(count) != 21] = float("nan")
    alone = [one[21:22] for one in computed(op, (poisoned, *args[1:]))]
    assert_same_bits(alone, whole, slice(21, 22))


@per_dtype
@pytest.mark.parametrize(("features", "cols"), [(64, 33), (4100, 9)])
def test_a_row_of_a_long_batch_has_the_bits_of_that_row_alone(
    features: int, cols: int, dtype: torch.dtype
) -> None:
    """Long batches have other tiles, and add all partitions in one program."""
    args = linear_args(129, features, cols, bias=True)(3, dtype)
    whole = computed("linear", args)
    for row in (0, 63, 64, 128):
        rows = slice(row, row + 1)
        assert_same_bits(computed("linear", take(args, (0,), rows)), whole, rows)


@per_dtype
@pytest.mark.parametrize(("rows", "features"), [(3, 77), (20, 130), (2, 4100), (65, 4100)])
def test_fused_products_have_the_bits_of_what_they_fuse(rows: int, features: int, dtype: torch.dtype) -> None:
    assert_fused_products_have_the_bits_of_what_they_fuse(triton, rows, features, dtype, DEVICE)


@per_dtype
def test_fused_sums_and_appends_have_the_bits_of_what_they_fuse(dtype: torch.dtype) -> None:
    randn = noise(5)
    x, y, weight = (randn(*shape, dtype=dtype).to(DEVICE) for shape in ((9, 77), (9, 77), (77,)))
    fused = triton("add_rms_norm")(x, y, weight, 1e-6, True)
    assert_same_bits(list(fused), [x + y, triton("rms_norm")(x + y, weight, 1e-6, True)])

    args = on_device(rope_append_args(9, 4, 2, 24, 10)(5, dtype))
    q, k, v, positions, cos, sin, k_cache, v_cache, slots = args
    q, k = (triton("rope")(one, positions, cos, sin) for one in (q, k))
    caches = outputs("kv_append", triton("kv_append"), (k, v, k_cache, v_cache, slots))
    assert_same_bits(outputs("rope_append", triton("rope_append"), args), [q, *caches])
