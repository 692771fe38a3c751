"""What only a GPU can show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nudging import LLM, Nudging, SamplingParams
from nudging.models.decoder import Decoder
from nudging.runner import ModelRunner
from tests.cases import Attention, linear_rope_args, load
from tests.compare import assert_same_bits
from tests.pairs import written
from tests.test_graphs import JOBS
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


def launched(monkeypatch: pytest.MonkeyPatch, **options: Any) -> LLM:
    """An LLM on the GPU that records nothing."""

    def runner(
        decoder: Decoder, num_blocks: int, block_size: int, prefix_caching: bool, team: Any
    ) -> ModelRunner:
        return ModelRunner(decoder, num_blocks, block_size, prefix_caching, team)

    monkeypatch.setattr("nudging.loading.make_runner", runner)
    return LLM(device="cuda", kv_cache_memory="4MiB", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_passes_write_what_launched_ones_write(
    tiny_pair: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and all at once, twice: graphs share their memory, and batches theirs with the next ones."""
    prompts = [[60 + i + j for j in range(3 + 7 * i)] for i in range(len(JOBS))]
    jobs = [
        (prompt, SamplingParams(max_tokens=30, ignore_eos=i % 2 == 0, **more), policy, speculate)
        for i, (prompt, (policy, speculate, more)) in enumerate(zip(prompts, JOBS, strict=True))
    ]
    with LLM(**tiny_pair, device="cuda", kv_cache_memory="4MiB", dtype=dtype) as llm:
        for runner in llm._engine.runners.values():
            runner.poison()
        rounds = []
        for _ in range(3):
            handles = [llm.submit(*job) for job in jobs]
            rounds.append([written(handle.result().outputs[0]) for handle in handles])
        alone = [written(llm.generate(*job)[0].outputs[0]) for job in jobs for _ in range(3)]
    with launched(monkeypatch, **tiny_pair, dtype=dtype) as llm:
        expected = [written(llm.generate(*job)[0].outputs[0]) for job in jobs]
    assert rounds == [expected] * 3
    assert alone == [text for text in expected for _ in range(3)]


def test_a_prompt_read_in_many_parts_is_the_prompt(tiny_pair: dict[str, Path]) -> None:
    """Nobody waits for a part's answer: its batch must not be overwritten before it was read."""
    prompt, params = [60 + i % 200 for i in range(900)], SamplingParams(max_tokens=8, ignore_eos=True)
    texts = []
    for size in (1024, 8):
        with LLM(**tiny_pair, device="cuda", kv_cache_memory="8MiB", max_batch_tokens=size) as llm:
            texts.append(written(llm.generate(prompt, params)[0].outputs[0]))
    assert texts[0] == texts[1]


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
