"""Weights in panels: the same products bit for bit, and the same weights."""

import pytest
import torch

from nudging import _C
from nudging.kernels.linear import linear
from nudging.kernels.weight import Int8Weight, PackedWeight, look_up, num_bytes, num_parameters
from tests.kernels.test_kernels import ISAS, cpu, per_isa
from tests.support.cases import linear_args
from tests.support.compare import assert_same_bits, per_dtype
from tests.support.weights import packed

SHAPES = [(1, 1, 1), (3, 33, 5), (7, 64, 16), (70, 130, 81), (5, 257, 129), (66, 4100, 20)]


@per_isa
@per_dtype
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(("rows", "features", "cols"), SHAPES)
def test_a_packed_weight_gives_the_bits_of_the_plain_one(
    rows: int, features: int, cols: int, int8: bool, dtype: torch.dtype, isa: _C.Isa
) -> None:
    x, weight, bias, _ = linear_args(rows, features, cols, bias=True, int8=int8)(3, dtype)
    for out in (None, torch.float32):
        want = cpu("linear", isa)(x, weight, bias, out)
        assert_same_bits([cpu("linear", isa)(x, packed(weight), bias, out)], [want])


@per_dtype
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize(("features", "cols"), [(1, 1), (33, 5), (64, 16), (130, 81)])
def test_what_was_packed_is_all_still_there(features: int, cols: int, int8: bool, dtype: torch.dtype) -> None:
    _, weight, _, _ = linear_args(1, features, cols, int8=int8)(3, dtype)
    one = packed(weight)
    plain = one.unpacked()
    values = weight.values if isinstance(weight, Int8Weight) else weight
    assert torch.equal(plain.values if isinstance(plain, Int8Weight) else plain, values)
    ids = torch.tensor([cols - 1, 0, cols // 2])
    assert torch.equal(one.columns(ids), values[ids])
    assert one.shape == (cols, features)
    assert num_parameters(one) == num_parameters(weight) == cols * features
    assert num_bytes(one) == num_bytes(weight)
    assert torch.equal(linear.reference(values.new_ones(2, features).to(dtype), one),
                       linear.reference(values.new_ones(2, features).to(dtype), weight))  # fmt: skip


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_id_that_the_table_does_not_have_is_refused(bad: int) -> None:
    table = packed(torch.zeros(20, 4))
    assert isinstance(table, PackedWeight)
    with pytest.raises(ValueError, match=f"id {bad} of 20"):
        look_up(table, torch.tensor([3, bad]))


def test_a_packed_weight_of_another_size_is_refused() -> None:
    table = packed(torch.zeros(20, 4))
    with pytest.raises(ValueError, match=r"linear: weight is \(32, 4\)"):
        cpu("linear", ISAS[0])(torch.zeros(1, 5), table)
    with pytest.raises(ValueError, match=r"linear: weight is \(32, 4\)"):
        cpu("linear", ISAS[0])(torch.zeros(1, 4), PackedWeight(table.panels, 33))
