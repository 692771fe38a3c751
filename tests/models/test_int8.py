"""int8 weights: how they are made, and engines that write what their oracle does; the op is in cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nudging import LLM, Base, Nudging, SamplingParams
from nudging.errors import BadRequest
from nudging.kernels.linear import linear
from nudging.kernels.op import FORCED
from nudging.kernels.weight import Int8Weight, quantize_int8
from nudging.models.loader import load_model
from tests.support.cases import linear_args, noise
from tests.support.pairs import Twin, assert_pools_are_whole, written


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
    x, weight, bias, _ = linear_args(2, 8, 3, bias=True, int8=True)(0, torch.float32)
    if linear.chosen(x, weight) != "cpu":
        pytest.skip("C++ is switched off")
    with pytest.raises(ValueError, match=r"linear: weight is \(3, 8\) torch.float32"):
        linear(x, Int8Weight(weight.values.float(), weight.scales))
    with pytest.raises(ValueError, match=r"linear: scales is \(2,\)"):
        linear(x, Int8Weight(weight.values, weight.scales[:2]))
    with pytest.raises(ValueError, match="linear: out_dtype is torch.float16"):
        linear(x, weight, bias, torch.float16)


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
