"""Every op's implementations against its reference in fp64, and the invariance (I6) that they promise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nudging import _C
from nudging.kernels.cpu import DTYPES, choose_isa
from tests.support.cases import (
    CASES,
    FLOATS,
    Args,
    Attention,
    Case,
    Make,
    add_norm_args,
    gated_act_args,
    kv_append_args,
    linear_args,
    load,
    noise,
    norm_args,
    page,
    rope_append_args,
    rope_args,
    soft_cap_args,
    stats_args,
)
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

ISAS = _C.available_isas()
# On a CPU looking up is all there is to it: the reference is what runs.
NOT_IN_CPP = {"embed"}

per_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


def cpu(op: str, isa: _C.Isa) -> Run:
    """The op's C++ implementation on one instruction set."""
    if op in NOT_IN_CPP:
        return load(op).reference
    run = next(found.run for found in load(op).implementations if found.name == "cpu")
    return functools.partial(run, isa=isa) if "isa" in inspect.signature(run).parameters else run


@per_isa
@per_dtype
@pytest.mark.parametrize("case", [case for case in CASES if case.op not in NOT_IN_CPP], ids=str)
def test_cpu_agrees_with_the_reference_in_fp64(case: Case, dtype: torch.dtype, isa: _C.Isa) -> None:
    op, args = load(case.op), case.make(0, dtype)
    assert op.chosen(*args) == "cpu"
    for got, want in zip(outputs(case.op, cpu(case.op, isa), args), wanted(case, args), strict=True):
        assert_within(case, args, got, want)


@per_isa
@per_dtype
@pytest.mark.parametrize(("op", "make", "by_row"), ROWWISE)
def test_bits_of_a_row_do_not_depend_on_how_many_rows_and_where(
    op: str, make: Make, by_row: tuple[int, ...], dtype: torch.dtype, isa: _C.Isa
) -> None:
    args = make(1, dtype)
    whole = outputs(op, cpu(op, isa), args)
    for count in range(1, 18):
        for start in (0, 3, 40 - count):
            rows = slice(start, start + count)
            assert_same_bits(outputs(op, cpu(op, isa), take(args, by_row, rows)), whole, rows)


@per_isa
@per_dtype
@pytest.mark.parametrize(("op", "make", "by_row"), ROWWISE)
def test_bits_of_a_row_do_not_depend_on_its_neighbours(
    op: str, make: Make, by_row: tuple[int, ...], dtype: torch.dtype, isa: _C.Isa
) -> None:
    args = make(2, dtype)
    whole = outputs(op, cpu(op, isa), args)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert_same_bits(outputs(op, cpu(op, isa), take(args, by_row, shuffled)), whole, shuffled)
    poisoned = args[0].clone()
    poisoned[torch.arange(40) != 21] = float("nan")
    alone = [one[21:22] for one in outputs(op, cpu(op, isa), (poisoned, *args[1:]))]
    assert_same_bits(alone, whole, slice(21, 22))


@per_isa
@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 70),
    features=st.integers(0, 80),
    cols=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_a_linear_row_alone_has_the_bits_of_that_row_in_any_shape(
    seed: int, rows: int, features: int, cols: int, dtype: torch.dtype, data: st.DataObject, isa: _C.Isa
) -> None:
    x, weight, bias, _ = linear_args(rows, features, cols, bias=True)(seed, dtype)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    whole = cpu("linear", isa)(x, weight, bias)
    assert_same_bits([cpu("linear", isa)(x[row : row + 1], weight, bias)], [whole], slice(row, row + 1))
    one = cpu("linear", isa)(x, weight[col : col + 1], bias[col : col + 1])
    assert_same_bits([one], [whole[:, col : col + 1]])


@per_isa
@per_dtype
@pytest.mark.parametrize("size", [1, 7, 33, 65])
def test_nothing_is_written_past_the_output(size: int, dtype: torch.dtype, isa: _C.Isa) -> None:
    x, kind = noise(size)(2 * size, dtype=dtype), DTYPES[dtype]
    source, team = x.data_ptr(), _C.Team(1)
    writers: list[Callable[[int], None]] = [
        lambda out: _C.linear(isa, team, kind, kind, source, source, 0, 0, out, 1, 1, size, False),
        lambda out: _C.rms_norm(isa, team, kind, source, source, out, 1, size, 1e-6, False),
        lambda out: _C.add_rms_norm(isa, team, kind, source, source, source, out, out, 1, size, 1e-6, False),
        lambda out: _C.layer_norm(isa, team, kind, source, out, 1, size, 1e-6),
        lambda out: _C.gated_act(isa, team, kind, _C.Activation.silu, source, out, 1, size),
        lambda out: _C.soft_cap(isa, team, kind, source, out, size, 30.0),
    ]
    for write in writers:
        guarded = torch.full((size + 64,), 77.0, dtype=dtype)
        write(guarded.data_ptr())
        assert bool((guarded[size:] == 77.0).all())
        assert bool((guarded[:size] != 77.0).all())


LARGE: list[tuple[str, Make]] = [
    ("linear", linear_args(17, 1025, 129, bias=True)),
    ("rms_norm", norm_args(900, 1025)),
    ("add_rms_norm", add_norm_args(900, 1025)),
    ("layer_norm", lambda seed, dtype: (noise(seed)(900, 1025, dtype=dtype), 1e-5)),
    ("rope", rope_args(1100, 12, 64, 32)),
    ("gated_act", gated_act_args(101, 1025, "gelu")),
    ("soft_cap", soft_cap_args(101, 1025, 30.0, 20.0)),
    ("kv_append", kv_append_args(33, 4, 5001)),
    ("rope_append", rope_append_args(1100, 12, 4, 64, 32)),
    ("paged_attention", Attention((300, 41, 7), (300, 1, 0))),
    ("paged_attention", Attention((300, 41, 7), (300, 1, 0), heads=10, kv_heads=2)),
    ("softmax_stats", stats_args(31, 4099)),
]


@per_isa
@pytest.mark.parametrize(("op", "make"), LARGE, ids=[op for op, _ in LARGE])
def test_bits_do_not_depend_on_the_number_of_threads(
    op: str, make: Make, isa: _C.Isa, threads: Callable[[int], None]
) -> None:
    args, results = make(3, torch.float32), []
    for count in (1, 2, 3):
        threads(count)
        results.append(outputs(op, cpu(op, isa), args))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@per_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    cuts=st.sets(st.integers(1, 149), max_size=6),
    block_size=st.sampled_from([1, 7, 16, 64]),
    window=st.sampled_from([0, 1, 13, 64, 100]),
    soft_cap=st.sampled_from([0.0, 10.0]),
    neighbours=st.lists(st.integers(1, 80), max_size=2),
)
def test_attention_bits_do_not_depend_on_chunks_blocks_or_other_sequences(
    seed: int,
    cuts: set[int],
    block_size: int,
    window: int,
    soft_cap: float,
    neighbours: list[int],
    dtype: torch.dtype,
    isa: _C.Isa,
) -> None:
    randn, run = noise(seed), cpu("paged_attention", isa)
    q = randn(150, 4, 24, dtype=dtype)
    k, v = randn(150, 2, 24, dtype=dtype), randn(150, 2, 24, dtype=dtype)

    def attend(start: int, end: int, others: list[int], block_size: int) -> Tensor:
        queries = [q[start:end], *(randn(1, 4, 24, dtype=dtype) for _ in others)]
        keys, values = ([own[:end], *(randn(n, 2, 24, dtype=dtype) for n in others)] for own in (k, v))
        order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed)).tolist()
        queries, keys, values = ([part[i] for i in order] for part in (queries, keys, values))
        rows = torch.tensor([0, *map(len, queries)]).cumsum(0).int()
        lengths = torch.tensor([len(one) for one in keys], dtype=torch.int32)
        paged = page(keys, values, block_size, seed + start)
        first = int(rows[order.index(0)])
        out: Tensor = run(torch.cat(queries), *paged, rows, lengths, 0.2, window, soft_cap)
        return out[first : first + end - start]

    whole = attend(0, 150, [], 16)
    bounds = [0, *sorted(cuts), 150]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert_same_bits([attend(start, end, neighbours, block_size)], [whole], slice(start, end))


@per_isa
@per_dtype
def test_fused_ops_have_the_bits_of_the_ops_that_they_fuse(dtype: torch.dtype, isa: _C.Isa) -> None:
    randn = noise(5)
    x, y, weight = randn(9, 77, dtype=dtype), randn(9, 77, dtype=dtype), randn(77, dtype=dtype)
    fused = cpu("add_rms_norm", isa)(x, y, weight, 1e-6, True)
    assert_same_bits(list(fused), [x + y, cpu("rms_norm", isa)(x + y, weight, 1e-6, True)])

    args = rope_append_args(9, 4, 2, 24, 10)(5, dtype)
    q, k, v, positions, cos, sin, k_cache, v_cache, slots = args
    q, k = (cpu("rope", isa)(one, positions, cos, sin) for one in (q, k))
    caches = outputs("kv_append", cpu("kv_append", isa), (k, v, k_cache, v_cache, slots))
    assert_same_bits(outputs("rope_append", cpu("rope_append", isa), args), [q, *caches])


@per_dtype
def test_fused_products_have_the_bits_of_what_they_fuse(dtype: torch.dtype) -> None:
    run = functools.partial(cpu, isa=ISAS[0])
    assert_fused_products_have_the_bits_of_what_they_fuse(run, 5, 77, dtype)
    assert_norms_within_products_have_the_bits_of_rms_norm(run, 5, 77, dtype)


@per_isa
@per_dtype
def test_attention_bits_of_a_head_do_not_depend_on_its_group(dtype: torch.dtype, isa: _C.Isa) -> None:
    q, *rest = Attention((70, 5), (2, 1), heads=7, kv_heads=1)(6, dtype)
    run = cpu("paged_attention", isa)
    whole = run(q, *rest)
    for head in range(7):
        assert_same_bits([run(q[:, head : head + 1], *rest)], [whole[:, head : head + 1]])


@per_isa
def test_attention_never_looks_at_blocks_that_its_window_has_left(isa: _C.Isa) -> None:
    args = Attention((100,), (5,), window=20)(4, torch.float32)
    run = cpu("paged_attention", isa)
    want = run(*args)
    args[3][0, : (95 - 19) // 16] = 2**31 - 1
    assert_same_bits([run(*args)], [want])


@per_isa
def test_argmax_ties_go_to_the_lowest_id(isa: _C.Isa) -> None:
    for first in (0, 1, 15, 16, 31, 62):
        logits = torch.zeros(2, 64)
        logits[0, first:] = 3.0
        logits[1, [first, 63]] = 3.0
        assert cpu("softmax_stats", isa)(logits).argmax.tolist() == [first, first]


@per_isa
def test_statistics_of_rows_without_a_softmax(isa: _C.Isa) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf] * 19, [nan] + [1.0] * 18, [1.0] * 18 + [nan], [inf] + [0.0] * 18])
    stats = cpu("softmax_stats", isa)(logits)
    assert stats.argmax.tolist() == [0, 0, 18, 0]
    assert stats.max.tolist()[0] == stats.lse.tolist()[0] == -inf
    assert stats.max.isnan().tolist() == stats.lse.isnan().tolist() == [False, True, True, False]
    assert stats.lse.tolist()[3] == inf


@per_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_all_values_of_a_16_bit_type_convert_as_in_torch(dtype: torch.dtype, isa: _C.Isa) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    for factor in (1.0, 1.0078125, 2.0**-9, 3 * 2.0**-12, 300.0):
        weight = torch.tensor([[factor]], dtype=dtype)
        product = every.float() * weight.float()
        for out_dtype in (torch.float32, dtype):
            got = cpu("linear", isa)(every, weight, None, out_dtype)
            torch.testing.assert_close(got, product.to(out_dtype), rtol=0, atol=0, equal_nan=True)


def refused(op: str, args: Args, *words: str) -> None:
    with pytest.raises(ValueError, match=op) as error:
        cpu(op, ISAS[0])(*args)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_refusals_name_the_op_the_value_and_the_limit() -> None:
    x = torch.zeros(2, 8)
    refused("linear", (x, torch.zeros(4, 7)), "(4, 7)", "(4, 8)")
    refused("linear", (x, torch.zeros(4, 8).bfloat16()), "bfloat16", "float32")
    refused("linear", (x, torch.zeros(4, 8), torch.zeros(5)), "bias", "(5,)", "(4,)")
    refused("linear", (x, torch.zeros(4, 8), None, torch.float16), "float16")
    refused("linear", (x[0], torch.zeros(4, 8)), "2 dimensions")
    refused("rms_norm", (x, torch.zeros(7), 1e-6), "(7,)", "(8,)")
    refused("add_rms_norm", (x, x[:1], torch.zeros(8), 1e-6), "y", "(1, 8)", "(2, 8)")
    refused("gated_act", (x, "relu"), "'relu'", "gelu_tanh")
    refused("gated_act", (torch.zeros(2, 7), "silu"), "7 columns")
    refused("soft_cap", (x, 0.0), "cap is 0")
    refused("soft_cap", (x, float("nan")), "nan")
    refused("softmax_stats", (torch.zeros(2, 0),), "vocab is 0")


def test_rope_refuses_a_position_outside_its_table() -> None:
    x, _, cos, sin = rope_args(2, 1, 8, 4)(0, torch.float32)
    refused("rope", (x, torch.tensor([3, 99]), cos, sin), "row 1", "99")
    refused("rope", (x, torch.tensor([-1, 3]), cos, sin), "row 0", "-1")
    refused("rope", (x[..., :6], torch.tensor([0, 1]), cos, sin), "8 channels", "6")


def test_kv_append_refuses_a_slot_outside_the_cache_and_writes_nothing() -> None:
    *args, slots = kv_append_args(5, 2, 16)(0, torch.float32)
    before = [args[2].clone(), args[3].clone()]
    slots[4] = 36
    refused("kv_append", (*args, slots), "row 4", "slot 36", "36 slots")
    assert_same_bits(args[2:], before)


def test_rope_append_refuses_what_does_not_fit_and_writes_nothing() -> None:
    *args, slots = rope_append_args(5, 2, 1, 16, 8)(0, torch.float32)
    before = [args[6].clone(), args[7].clone()]
    refused("rope_append", (*args, slots + 4), "slot", "8 slots")
    refused("rope_append", (*args[:3], args[3] + 99, *args[4:], slots), "row 0", "99")
    refused("rope_append", (args[0], args[1][:4], *args[2:], slots), "k is (4, 1, 16)", "(5, 1, 16)")
    refused("rope_append", (*args[:6], args[6].transpose(0, 1), args[7], slots), "k_cache")
    assert_same_bits(args[6:], before)


def test_paged_attention_refuses_metadata_that_does_not_fit() -> None:
    def broken(index: int, entry: Any, value: int) -> Args:
        args = Attention((40, 9), (2, 1))(0, torch.float32)
        args[index][entry] = value
        return args

    refused("paged_attention", broken(3, (0, 2), -1), "entry 2 of sequence 0 is -1", "blocks")
    refused("paged_attention", broken(3, (1, 0), 7), "entry 0 of sequence 1 is 7", "7 blocks")
    refused("paged_attention", broken(4, 1, 4), "cu_seqlens_q falls from 4 to 3")
    refused("paged_attention", broken(4, 2, 4), "from 0 to 4", "from 0 to 3")
    refused("paged_attention", broken(5, 0, 1), "2 rows", "length of 1")
    refused("paged_attention", broken(5, 0, 81), "length 81", "5 blocks of 16")
    window = Attention((40, 9), (2, 1), window=-1)
    refused("paged_attention", window(0, torch.float32), "window is -1")


def test_other_dtypes_go_to_the_reference() -> None:
    x = torch.zeros(2, 8, dtype=torch.float64)
    assert load("linear").chosen(x, torch.zeros(4, 8, dtype=torch.float64)) == "reference"
    assert load("softmax_stats").chosen(x) == "reference"


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    assert choose_isa("portable") == _C.Isa.portable
    assert choose_isa("") == ISAS[0]
    with pytest.raises(ValueError, match="'sse9'.*portable"):
        choose_isa("sse9")
