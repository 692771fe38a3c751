"""Every Triton kernel against its op's reference, and the bits that it promises.

On a machine with a GPU the kernels run there (`make gpu`), elsewhere under Triton's interpreter: the same
cases, the same tolerances.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nudging.kernels.cuda import ARRIVALS
from nudging.kernels.rms_norm import Norm
from nudging.kernels.rope_append import HeadNorm
from nudging.kernels.weight import quantize_int8
from tests.support.cases import CASES, Args, Case, Make, linear_args, load, noise, rope_append_args
from tests.support.compare import (
    ROWWISE,
    Run,
    assert_fused_products_have_the_bits_of_what_they_fuse,
    assert_norms_within_products_have_the_bits_of_rms_norm,
    assert_same_bits,
    assert_within,
    outputs,
    per_dtype,
    take,
    wanted,
)
from tests.support.interpreter import DEVICE
from tests.support.large import LARGE, LARGE_ROWS

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
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (3, 77), (16, 130), (17, 77), (2, 1030), (2, 4100)])
def test_norms_within_products_have_the_bits_of_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    assert_norms_within_products_have_the_bits_of_rms_norm(triton, rows, dim, dtype, DEVICE)


@per_dtype
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_partitions_that_the_last_program_adds_have_the_bits_of_linear(
    rows: int, int8: bool, dtype: torch.dtype
) -> None:
    x, weight, bias, _ = on_device(linear_args(rows, 4100, 33, bias=True, int8=int8)(4, dtype))
    residual, arrivals = noise(5)(rows, 33, dtype=dtype).to(DEVICE), counters()
    want = residual + triton("linear")(x, weight, bias)
    for counted in (None, arrivals, arrivals):
        assert_same_bits([triton("linear_add")(x, weight, residual, bias, counted).x], [want])
    assert not arrivals.any()


@per_dtype
@pytest.mark.parametrize(("rows", "head_dim", "int8"), [(1, 8, False), (5, 36, True), (17, 8, False)])
def test_heads_normalised_within_products_have_the_bits_of_what_they_fuse(
    rows: int, head_dim: int, int8: bool, dtype: torch.dtype
) -> None:
    """Heads of more tiles than one, and of no power of two; of 17 rows each op is a launch of its own."""
    randn, arrivals = noise(rows), counters()
    x, down, residual = (randn(*s, dtype=dtype).to(DEVICE) for s in ((rows, 9), (70, 9), (rows, 70)))
    stream = triton("linear_add")(x, down, residual)
    weight = randn(5 * head_dim, 70)
    read = on_device((quantize_int8(weight) if int8 else weight.to(dtype),))[0]
    rest = on_device(rope_append_args(rows, 3, 1, head_dim, head_dim // 2)(7, dtype)[3:])
    entered = triton("rms_norm")(stream.x, residual[0], 1e-5, True)
    heads = triton("linear")(entered, read).view(rows, 5, head_dim).split_with_sizes((3, 1, 1), dim=1)
    for q, k, unit_offset in ((1, 1, False), (1, 1, True), (3, 1, False)):
        weights = (randn(n * head_dim, dtype=dtype).to(DEVICE) for n in (q, k))
        norm, head_norm = Norm(residual[0], 1e-5, True, stream.squares), HeadNorm(*weights, 1e-6, unit_offset)
        fused = (stream.x, read, None, *rest, norm, head_norm, arrivals)
        want = outputs("rope_append", triton("rope_append"), (*heads, *rest, head_norm))
        for _ in range(2):
            assert_same_bits(outputs("linear_rope_append", triton("linear_rope_append"), fused), want)
    assert not arrivals.any()


def counters() -> Tensor:
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=DEVICE)


@per_dtype
def test_an_id_outside_the_table_gives_nan_and_no_other_row(dtype: torch.dtype) -> None:
    table, ids = noise(3)(9, 20, dtype=dtype).to(DEVICE), torch.tensor([8, 9, -1, 0]).to(DEVICE)
    found = triton("embed")(table, ids)
    assert_same_bits([found.x[[0, 3]]], [table[[8, 0]]])
    assert bool(found.x[1:3].isnan().all() and found.squares[1:3].isnan().any(1).all())


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


@per_dtype
def test_norms_within_sums_and_appends_have_the_bits_of_rms_norm(dtype: torch.dtype) -> None:
    randn = noise(8)
    x, y, weight, after = (
        randn(*shape, dtype=dtype).to(DEVICE) for shape in ((9, 77), (9, 77), (77,), (77,))
    )
    total, entered = triton("add_rms_norm")(x, y, weight, 1e-6, True, after)
    assert_same_bits([total], [x + triton("rms_norm")(y, after, 1e-6, True)])
    assert_same_bits([entered], [triton("rms_norm")(total, weight, 1e-6, True)])
    alone = triton("add_rms_norm")(x, y, None, 1e-6, True, after)
    assert_same_bits(list(alone), [total, total])

    q, k, *rest = on_device(rope_append_args(9, 4, 2, 24, 10)(5, dtype))
    for sizes in ((24, 24), (96, 48)):
        norm = HeadNorm(*(randn(size, dtype=dtype).to(DEVICE) for size in sizes), 1e-6, sizes[0] == 24)
        apart = (*norm.apply(triton("rms_norm"), q, k), *rest)
        assert_same_bits(
            outputs("rope_append", triton("rope_append"), (q, k, *rest, norm)),
            outputs("rope_append", triton("rope_append"), apart),
        )
