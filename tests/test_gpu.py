"""What only a GPU can show."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nudging import LLM, Nudging, SamplingParams
from tests.cases import Attention, linear_rope_args, load
from tests.compare import assert_same_bits
from tests.pairs import written
from tests.test_lm_head import head_args
from tests.test_triton import AGREE, on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


def test_fp32_text_on_the_gpu_is_the_cpus(tiny_pair: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[60 + i, 70, 80] for i in range(4)]
    outputs = []
    for device in ("cpu", "cuda"):
        with LLM(**tiny_pair, device=device, kv_cache_memory="4MiB") as llm:
            results = llm.generate(prompts, params, Nudging(0.4, "token"))
            outputs.append([written(result.outputs[0]) for result in results])
    assert outputs[0] == outputs[1]


def test_tensors_on_the_gpu_go_to_triton() -> None:
    for case in AGREE:
        assert load(case.op).chosen(*on_device(case.make(0, torch.bfloat16))) == "triton"


def test_a_captured_graph_replays_the_bits_of_the_launches() -> None:
    args = on_device(linear_rope_args(5, 896, 14, 2, 64, 32)(1, torch.bfloat16))
    x, weight = args[:2]

    def step() -> list[Tensor]:
        q = load("linear_rope_append")(*args)
        return [q, load("gated_linear")(x, weight, "silu"), load("linear")(x, weight)]

    first = x.clone()
    want = [one.clone() for one in step()]
    x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    x.copy_(first)
    graph.replay()
    assert_same_bits(got, want)


def test_a_captured_graph_replays_attention_and_what_is_picked() -> None:
    q, *cache = on_device(Attention((900, 300), (1, 9), heads=4, kv_heads=2, head_dim=64)(1, torch.bfloat16))
    x, *head = on_device(head_args(16, torch.bfloat16, 30.0))

    def step() -> list[Tensor]:
        return [load("paged_attention")(q, *cache), *load("lm_head")(x, *head)]

    inputs = [q.clone(), x.clone()]
    want = [one.clone() for one in step()]
    q.zero_()
    x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    q.copy_(inputs[0])
    x.copy_(inputs[1])
    graph.replay()
    assert_same_bits(got, want)
