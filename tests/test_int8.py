"""int8 weights: the op against its reference, and engines that write what their oracle does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nudging import _C, LLM, Base, Nudging, SamplingParams
from nudging.errors import BadRequest
from nudging.kernels.linear_int8 import linear_int8, quantize_int8
from nudging.kernels.op import FORCED
from nudging.models.load import load_model
from tests.cases import Args, Case, exact, noise
from tests.compare import assert_same_bits, assert_within, per_dtype
from tests.pairs import Twin, assert_pools_are_whole, written

ISAS = _C.available_isas()
per_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


def int8_args(rows: int, features: int, cols: int, dtype: torch.dtype, bias: bool = False) -> Args:
    randn = noise(rows + features + cols)
    x, weight = randn(rows, features, dtype=dtype), quantize_int8(randn(cols, features))
    return x, weight.values, weight.scales, randn(cols, dtype=dtype) if bias else None


def on_isa(isa: _C.Isa, *args: object) -> Tensor:
    run = next(found.run for found in linear_int8.implementations if found.name == "cpu")
    result: Tensor = run(*args, isa=isa)
    return result


def sum_of_sizes(args: Args, want: Tensor) -> Tensor:
    x, values, scales, bias = args[:4]
    sizes: Tensor = (x.double().abs() @ values.double().abs().T) * scales
    return sizes if bias is None else sizes + bias.double().abs()


@per_isa
@per_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 64, 7), (7, 33, 5), (3, 1025, 33), (16, 48, 129), (0, 64, 3)]
)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_cpp_agrees_with_the_reference_in_fp64(
    shape: tuple[int, int, int], dtype: torch.dtype, isa: _C.Isa, out_dtype: torch.dtype | None
) -> None:
    reason = "as linear; the scale adds a rounding"
    case = Case("linear_int8", str(shape), lambda seed, dtype: (), 5, reason, sum_of_sizes)
    args = (*int8_args(*shape, dtype, bias=True), out_dtype)
    got = on_isa(isa, *args)
    assert got.dtype == (out_dtype or dtype)
    assert_within(case, args, got, exact(linear_int8, *args))


@per_isa
@per_dtype
def test_bits_of_a_row_do_not_depend_on_how_many_rows_and_where(dtype: torch.dtype, isa: _C.Isa) -> None:
    x, *weight = int8_args(40, 513, 33, dtype, bias=True)
    whole = on_isa(isa, x, *weight)
    for count in (*range(1, 17), 33):
        for first in (0, 40 - count):
            rows = slice(first, first + count)
            assert_same_bits([on_isa(isa, x[rows], *weight)], [whole], rows)


def test_quantised_weights_are_the_nearest_of_each_channel() -> None:
    weight = noise(1)(33, 100) * torch.logspace(-6, 3, 33)[:, None]
    weight[5] = 0
    values, scales = quantize_int8(weight)
    error = (values.double() * scales.double()[:, None] - weight).abs()
    assert bool((error <= scales.double()[:, None] * 0.50001).all())
    assert int(values.abs().max()) == 127
    assert scales[5] == 0
    assert not values[5].any()


def test_refusals_name_the_op_and_the_value() -> None:
    x, values, scales, bias = int8_args(2, 8, 3, torch.float32, bias=True)
    if linear_int8.chosen(x, values, scales) != "cpu":
        pytest.skip("C++ is switched off")
    with pytest.raises(ValueError, match=r"linear_int8: weight is \(3, 8\) torch.float32"):
        linear_int8(x, values.float(), scales)
    with pytest.raises(ValueError, match=r"linear_int8: scales is \(2,\)"):
        linear_int8(x, values, scales[:2])
    with pytest.raises(ValueError, match="linear_int8: out_dtype is torch.float16"):
        linear_int8(x, values, scales, bias, torch.float16)


@pytest.fixture(scope="module")
def int8_llm(tiny_pair: dict[str, Path]) -> Iterator[LLM]:
    with LLM(**tiny_pair, quantization="int8", threads=3, kv_cache_memory="8MiB") as llm:
        yield llm


@pytest.mark.skipif(FORCED == "reference", reason="the references do not promise it")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_engine_lazy_and_speculative_equals_the_oracle(int8_llm: LLM, temperature: float) -> None:
    twin, prompts = Twin(int8_llm), [[60 + i, 70, 80 + 3 * i] for i in range(6)]
    for policy in (Base(), Nudging(0.4, "token"), Nudging(0.3, "word")):
        params = [SamplingParams(max_tokens=20, temperature=temperature, seed=i) for i in range(6)]
        want = [twin.generate(p, one, policy) for p, one in zip(prompts, params, strict=True)]
        for speculate in ("off", 4, "auto"):
            results = int8_llm.generate(prompts, params, policy, speculate)
            assert [written(result.outputs[0]) for result in results] == want
    assert_pools_are_whole(int8_llm)


def test_precision_is_declared_and_takes_less_memory(int8_llm: LLM, tiny_pair: dict[str, Path]) -> None:
    assert set(int8_llm.stats().precision.values()) == {"int8, float32"}
    small, full = load_model(tiny_pair["base"], quantization="int8"), load_model(tiny_pair["base"])
    assert full.precision == "float32"
    assert small.num_parameters == full.num_parameters
    assert small.weight_bytes < full.weight_bytes
    ids = list(range(60, 100))
    error = (small.logits(ids) - full.logits(ids)).abs().mean()
    assert 0 < error < 0.1 * full.logits(ids).std()


def test_threads_change_no_token_and_options_are_checked(tiny_pair: dict[str, Path]) -> None:
    results = []
    for threads in (1, 2, 5):
        with LLM(**tiny_pair, threads=threads, kv_cache_memory="4MiB") as llm:
            assert {runner.team.threads for runner in llm._engine.runners.values()} == {threads}
            output = llm.generate([60, 70, 80], SamplingParams(max_tokens=16), Nudging(0.4, "token"))
            results.append(written(output[0].outputs[0]))
    assert results[0] == results[1] == results[2]
    for wrong in (0, 2000, 1.5, True):
        with pytest.raises(BadRequest, match=f"threads is {wrong}; it must be an integer from 1 to 1024"):
            LLM(**tiny_pair, threads=wrong)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="quantization is 'int4'; it must be None or 'int8'"):
        LLM(**tiny_pair, quantization="int4")
