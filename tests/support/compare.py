"""What holds an op to its reference and to invariance (I6), whatever implements it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nudging.kernels.linear_add import Stream
from nudging.kernels.rms_norm import Norm
from tests.support.cases import (
    FLOATS,
    Args,
    Case,
    Make,
    add_norm_args,
    exact,
    gated_act_args,
    gated_linear_args,
    linear_add_args,
    linear_args,
    load,
    noise,
    norm_args,
    rope_append_args,
    rope_args,
    soft_cap_args,
    stats_args,
)

Run = Callable[..., Any]

per_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))

# The arguments that an op writes into.
WRITTEN = {"kv_append": (2, 3), "rope_append": (6, 7), "linear_rope_append": (6, 7)}


def outputs(op: str, run: Run, args: Args) -> list[Tensor]:
    """What the op returns and copies of the caches that it writes, as a list."""
    written = WRITTEN.get(op, ())
    args = tuple(arg.clone() if i in written else arg for i, arg in enumerate(args))
    result = run(*args)
    if isinstance(result, Stream):
        result = result.x  # the sums of squares are each device's own
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    return [*returned, *(args[i] for i in written)]


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of `dtype` at these sizes."""
    info = torch.finfo(dtype)
    return torch.exp2(size.clamp(min=info.tiny).log2().floor()) * info.eps


def wanted(case: Case, args: Args) -> list[Tensor]:
    """What the reference gives when all of it runs in fp64; see `outputs`."""
    # `exact` writes into caches that are fp64 already, others it would copy.
    caches = WRITTEN.get(case.op, ())
    widened = tuple(arg.double() if i in caches else arg for i, arg in enumerate(args))
    found = outputs(case.op, functools.partial(exact, load(case.op)), widened)
    return [one.double() if one.dtype.is_floating_point else one for one in found]


def assert_within(case: Case, args: Args, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    if not got.dtype.is_floating_point:
        assert torch.equal(got.long(), want.long())
        return
    finite = want.isfinite()
    assert torch.equal(got.double()[~finite].nan_to_num(1.5), want[~finite].nan_to_num(1.5))
    if case.magnitude is None:
        size = want.abs().amax(-1, keepdim=True).expand_as(want) if want.numel() else want
    else:
        size = case.magnitude(args, want)
    budget = case.ulps * ulp(size, torch.float32)
    if got.dtype != torch.float32:
        budget = budget + ulp(want.abs() + budget, got.dtype) / 2
    error = (got.double() - want).abs()[finite] / budget[finite].clamp(min=1e-300)
    assert bool((error <= 1).all()), f"{case}: {float(error.max()):.2f} times the tolerance"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(got: list[Tensor], want: list[Tensor], rows: Any = slice(None)) -> None:
    """Each tensor of `got` has the bits of the rows of its fellow in `want`."""
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(bits(one), bits(other[rows]))


# Rows: op, arguments of 40 rows, which of them are by row.
ROWWISE: list[tuple[str, Make, tuple[int, ...]]] = [
    ("linear", linear_args(40, 513, 33, bias=True), (0,)),
    ("linear", linear_args(40, 64, 7, out=torch.float32), (0,)),
    ("linear", linear_args(40, 4100, 9), (0,)),
    ("linear", linear_args(40, 513, 33, bias=True, int8=True), (0,)),
    ("linear_add", linear_add_args(40, 65, 20, bias=True), (0, 2)),
    ("gated_linear", gated_linear_args(40, 65, 20, "gelu", bias=True), (0,)),
    ("gated_linear", gated_linear_args(40, 65, 20, "silu", normed=True), (0,)),
    ("rms_norm", norm_args(40, 77), (0,)),
    ("rms_norm", norm_args(40, 3, 64, unit_offset=True), (0,)),
    ("add_rms_norm", add_norm_args(40, 77), (0, 1)),
    ("layer_norm", lambda seed, dtype: (noise(seed)(40, 77, dtype=dtype), 1e-5), (0,)),
    ("rope", rope_args(40, 3, 80, 20), (0, 1)),
    ("gated_act", gated_act_args(40, 77, "silu"), (0,)),
    ("gated_act", gated_act_args(40, 77, "gelu"), (0,)),
    ("gated_act", gated_act_args(40, 77, "gelu_tanh"), (0,)),
    ("soft_cap", soft_cap_args(40, 77, 30.0, 20.0), (0,)),
    ("softmax_stats", stats_args(40, 1025), (0,)),
]


def take(args: Args, by_row: tuple[int, ...], rows: Any) -> Args:
    return tuple(arg[rows] if i in by_row else arg for i, arg in enumerate(args))


def assert_fused_products_have_the_bits_of_what_they_fuse(
    run: Callable[[str], Run], rows: int, features: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """On random numbers, with as many rows and inputs; `run` gives an op's implementation."""
    randn = noise(7)
    x = randn(rows, features, dtype=dtype).to(device)
    weight, bias = randn(18, features, dtype=dtype).to(device), randn(18, dtype=dtype).to(device)
    apart = run("gated_act")(run("linear")(x, weight, bias), "silu")
    assert_same_bits([run("gated_linear")(x, weight, "silu", bias)], [apart])

    rest = tuple(arg.to(device) for arg in rope_append_args(rows, 3, 1, 8, 4)(7, dtype)[3:])
    weight = randn(40, features, dtype=dtype).to(device)
    heads = run("linear")(x, weight).view(rows, 5, 8).split_with_sizes((3, 1, 1), dim=1)
    assert_same_bits(
        outputs("linear_rope_append", run("linear_rope_append"), (x, weight, None, *rest)),
        outputs("rope_append", run("rope_append"), (*heads, *rest)),
    )


def assert_norms_within_products_have_the_bits_of_rms_norm(
    run: Callable[[str], Run], rows: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """The residual stream of `dim` channels, written by one product and read by others."""
    randn = noise(rows + dim)
    x, down = randn(rows, 20, dtype=dtype).to(device), randn(dim, 20, dtype=dtype).to(device)
    residual, weight = randn(rows, dim, dtype=dtype).to(device), randn(dim, dtype=dtype).to(device)
    stream = run("linear_add")(x, down, residual)
    assert_same_bits([stream.x], [residual + run("linear")(x, down)])
    reads = randn(40, dim, dtype=dtype).to(device)
    rest = tuple(arg.to(device) for arg in rope_append_args(rows, 3, 1, 8, 4)(7, dtype)[3:])
    embedded = run("embed")(residual, torch.arange(rows, device=device).flip(0), 3.0)
    assert_same_bits([embedded.x], [(residual * 3.0).flip(0)])
    cases = [(one, unit_offset) for one in (stream, embedded) for unit_offset in (False, True)]
    for stream, unit_offset in cases:
        norm = Norm(weight, 1e-5, unit_offset, stream.squares)
        entered = run("rms_norm")(stream.x, weight, 1e-5, unit_offset)
        assert_same_bits([run("linear")(stream.x, reads, norm=norm)], [run("linear")(entered, reads)])
        assert_same_bits(
            [run("gated_linear")(stream.x, reads, "silu", None, norm)],
            [run("gated_linear")(entered, reads, "silu")],
        )
        assert_same_bits(
            outputs("linear_rope_append", run("linear_rope_append"), (stream.x, reads, None, *rest, norm)),
            outputs("linear_rope_append", run("linear_rope_append"), (entered, reads, None, *rest)),
        )
