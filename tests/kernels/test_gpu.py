"""What only a GPU can show."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nudging import LLM, Base, Nudging, SamplingParams
from nudging.core.executor import record_ahead
from nudging.executor.model_runner import ModelRunner
from nudging.kernels.cuda import ARRIVALS
from nudging.kernels.rms_norm import Norm
from nudging.kernels.rope_append import HeadNorm
from nudging.models.decoder import Decoder
from nudging.policies import Policy
from tests.executor.test_graphs import JOBS
from tests.kernels.test_lm_head import head_args
from tests.kernels.test_triton import AGREE, on_device
from tests.support.cases import Attention, linear_rope_args, load, noise
from tests.support.compare import assert_same_bits
from tests.support.pairs import written

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
        decoder: Decoder, num_blocks: int, block_size: int, prefix_caching: bool, team: Any, flash: Any
    ) -> ModelRunner:
        return ModelRunner(decoder, num_blocks, block_size, prefix_caching, team, flash)

    monkeypatch.setattr("nudging.api.loading.make_runner", runner)
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


def test_what_is_recorded_ahead_writes_what_is_launched(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines record at once, each whenever it has nothing to do; then they write at once."""
    prompts = [[60 + i, 61, 62] for i in range(3)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    kinds: list[tuple[Policy, Any]] = [
        (Base(), "off"),
        (Nudging(0.4, "token"), 4),
        (Nudging(0.4, "word"), "auto"),
    ]
    with launched(monkeypatch, **tiny_pair) as llm:
        expected = [[written(r.outputs[0]) for r in llm.generate(prompts, params, *kind)] for kind in kinds]
    monkeypatch.undo()
    monkeypatch.setattr("nudging.core.engine_loop.IDLE_SECONDS", 0.01)
    monkeypatch.setattr("nudging.core.executor.MAX_TEXTS", 3)
    options: dict[str, Any] = {**tiny_pair, "device": "cuda", "kv_cache_memory": "4MiB"}
    with LLM(**options) as one, LLM(**options) as other:
        for llm in (one, other):
            for policy, speculate in kinds:
                llm.generate(prompts[0], params, policy, speculate)
        for llm in (one, other):
            while llm._thread.call(lambda llm=llm: record_ahead(llm._engine.runners.values())):  # type: ignore[misc]
                pass
        for policy, speculate in kinds:
            both = [[llm.submit(p, params, policy, speculate) for p in prompts] for llm in (one, other)]
            for handles in both:
                found = [written(handle.result().outputs[0]) for handle in handles]
                assert found == expected[kinds.index((policy, speculate))]


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
        return [load("paged_attention")(q, *cache), load("lm_head")(x, *head)]

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


def layers(rows: int, device: torch.device) -> Callable[[Tensor | None], list[Tensor]]:
    """Six layers as a decoder runs them, of the sizes of a small model, after 900 tokens of context; heads of
    every other one are normalised.  Before them the embeddings, behind them the head.
    """
    hidden, heads, kv_heads, head_dim, inner = 896, 14, 2, 64, 4864
    randn, dtype = noise(3), torch.bfloat16

    def weight(cols: int, features: int) -> Tensor:
        return (randn(cols, features) / features**0.5).to(device, dtype)

    weights = [
        (
            weight((heads + 2 * kv_heads) * head_dim, hidden),
            weight(hidden, heads * head_dim),
            weight(2 * inner, hidden),
            weight(hidden, inner),
        )
        for _ in range(6)
    ]
    table, norm = randn(400, hidden).to(device, dtype), randn(hidden).to(device, dtype)
    head_norm = HeadNorm(*randn(2, head_dim).to(device, dtype), 1e-6)
    ids, cold = torch.arange(rows, device=device) + 60, torch.ones(rows, device=device)
    caches = randn(6, 2, 64, 16, kv_heads, head_dim).to(device, dtype)
    angles = torch.arange(1024)[:, None] * torch.logspace(0, -3, head_dim // 2)[None]
    tables = angles.cos().to(device), angles.sin().to(device)
    at = torch.arange(900 - rows, 900, device=device)
    blocks = torch.arange(64, dtype=torch.int32, device=device)[None]
    cu, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, rows], [900]))

    def run(arrivals: Tensor | None) -> list[Tensor]:
        x, squares = load("embed")(table, ids, 2.0)
        for index, ((qkv, o, gate_up, down), (k, v)) in enumerate(zip(weights, caches, strict=True)):
            entered, by_head = Norm(norm, 1e-5, False, squares), head_norm if index % 2 else None
            q = load("linear_rope_append")(x, qkv, None, at, *tables, k, v, at, entered, by_head, arrivals)
            out = load("paged_attention")(q, k, v, blocks, cu, lengths, 0.125, 0, 0.0, arrivals)
            x, squares = load("linear_add")(out.flatten(1), o, x, None, arrivals)
            y = load("gated_linear")(x, gate_up, "silu", None, Norm(norm, 1e-5, False, squares))
            x, squares = load("linear_add")(y, down, x, None, arrivals)
        last = Norm(norm, 1e-5, False, squares)
        said = load("lm_head")(x, table, 390, 0.0, cold, ids, ids, ids - 60, last)
        return [x, caches.clone(), said]

    return run


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("pdl", [False, True])
def test_layers_have_the_same_bits_every_time_fused_or_not_and_starting_early_or_not(
    rows: int, pdl: bool
) -> None:
    """A race would show in some of 300 replays: programs that arrive together, kernels that overlap."""
    from nudging.kernels.gpu.common import configs

    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    if pdl and capability < (9, 0):
        pytest.skip("kernels cannot start early before compute capability 9.0")
    run, arrivals = layers(rows, device), torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
    plain = replace(configs.config_of(device), pdl=False)
    with mock.patch.dict(configs.TABLE, {capability: replace(plain, fused_norms=False)}):
        want = run(None)
    with mock.patch.dict(configs.TABLE, {capability: replace(plain, pdl=pdl)}):
        assert_same_bits(run(arrivals), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(arrivals)
    for _ in range(300):
        for one in got:
            one.zero_()
        graph.replay()
        assert_same_bits(got, want)
    assert not arrivals.any()
