"""Rivals hold the model that ours holds, are chosen by name, and say why they are not there."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.arms.arm import Limits, Prompts, Sample, Setting, up_to_end
from benchmarks.arms.sglang import sglang_arms
from benchmarks.arms.vllm import vllm_arms
from benchmarks.pair import check_patterns, matches
from benchmarks.rivals import DifferentModel, Engine, likeness
from nudging.errors import BadRequest


@dataclass(frozen=True)
class FakeRival:
    """Answers with the given logits."""

    rows: Tensor
    name: str = "rival"
    text: None = None

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        raise NotImplementedError

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        return [self.rows for _ in texts]


def test_another_model_is_noticed_and_other_rounding_is_not() -> None:
    rows = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    ids = [list(range(100))]
    found = likeness(FakeRival(rows + 1e-4), ids, [rows])
    assert found.argmax == 1.0
    assert found.probability < 1e-6, "a constant changes no probability"
    nearly = rows.clone()
    nearly.scatter_(1, rows.topk(2, 1).indices[:, 1:], rows.max(1, keepdim=True).values + 0.1)
    assert likeness(FakeRival(nearly), ids, [rows]).argmax == 0.0, "near-ties all lost, and no other model"
    shifted = rows.clone()
    shifted[:3] = shifted[:3].roll(1, dims=1)
    assert likeness(FakeRival(shifted), ids, [rows]).argmax == 0.97
    for other in (rows.roll(1, dims=1), torch.full_like(rows, float("nan")), rows[:, :15]):
        with pytest.raises(DifferentModel, match="rival"):
            likeness(FakeRival(other), ids, [rows])


def test_engines_that_cannot_be_run_say_why(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, torch.device("cpu"), 1, tmp_path)
    there = Engine({"torch": "torch"}, lambda setting, wanted: [])
    assert there.obstacle(setting) is None
    elsewhere = replace(setting, device=torch.device("cuda"))
    assert there.obstacle(elsewhere) == "measured on cpu only, not on cuda"
    assert replace(there, devices=("cuda",)).obstacle(elsewhere) is None
    absent = Engine({"torch": "torch", "no_such_module": "no-such-package"}, lambda setting, wanted: [])
    assert absent.obstacle(setting) == "not installed; pip install no-such-package"


def test_arms_are_chosen_by_pattern_and_a_wrong_one_is_refused() -> None:
    assert matches("llama.cpp bf16", [])
    assert matches("llama.cpp bf16", ["base alone", "llama.cpp*"])
    assert not matches("base alone, n-gram", ["base alone"])
    arms = [FakeRival(torch.zeros(1), "base alone")]
    check_patterns(["base*"], arms, {})
    with pytest.raises(BadRequest, match=r"'rival\*'.*rival: not installed"):
        check_patterns(["base*", "rival*"], arms, {"rival": "not installed"})


def test_an_end_of_sequence_is_no_token_of_a_text() -> None:
    assert up_to_end(iter([5, 6, 2, 7]), frozenset({2, 3}), Limits(4, ignore_eos=False)) == (5, 6)
    assert up_to_end([5, 6, 2, 7], frozenset({2, 3}), Limits(4, ignore_eos=True)) == (5, 6, 2, 7)


class StandIn(ModuleType):
    """What stands for another engine's package: it notes what it is asked, and answers with these tokens."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opened: dict[str, Any] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.LLM = self.Engine = self.open
        self.SamplingParams = dict

    def open(self, **options: Any) -> Any:
        self.opened = options
        return SimpleNamespace(generate=self.vllm if self.__name__ == "vllm" else self.sglang)

    def vllm(self, prompts: list[Any], params: dict[str, Any], use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, params, use_tqdm))
        tops = [{i: SimpleNamespace(logprob=x) for i, x in enumerate(row[:2].tolist())} for row in TOPS]
        said = SimpleNamespace(token_ids=[5, 6, 2], logprobs=tops[-1:])
        return [SimpleNamespace(outputs=[said], prompt_logprobs=[None, *tops[:-1]])]

    def sglang(self, **asked: Any) -> dict[str, Any]:
        self.asked.append(tuple(asked.items()))
        tops = [[(x, i, None) for i, x in enumerate(row[:2].tolist())] for row in TOPS]
        said = {"input_top_logprobs": [None, *tops[:-1]], "output_top_logprobs": tops[-1:]}
        return {"output_ids": [5, 6, 2], "meta_info": said}


# Of three rows the two likeliest tokens are told; the other four are equally likely.
TOPS = torch.tensor([[0.5, 0.3] + [0.05] * 4, [0.1, 0.7] + [0.05] * 4, [0.6, 0.38] + [0.005] * 4]).log()


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Two checkpoints of 30 and 10 bytes for a GPU with 60 GiB, a third of them taken."""
    for role, size in (("base", 30), ("guide", 10)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "model.safetensors").write_bytes(bytes(size))
    config = SimpleNamespace(eos_token_ids=(3, 2), vocab_size=6)
    monkeypatch.setattr("benchmarks.arms.vllm.read_config", lambda path: config)
    monkeypatch.setattr("benchmarks.arms.sglang.read_config", lambda path: config)
    properties = SimpleNamespace(total_memory=60 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 60 << 30))
    return Setting(tmp_path / "base", tmp_path / "guide", torch.device("cuda"), 1, tmp_path)


def test_vllm_is_asked_for_the_same_tokens_and_nothing_else(
    on_gpu: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = StandIn("vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)
    (arm,) = vllm_arms(on_gpu, lambda name: name == "vllm bf16")
    assert module.opened == {
        "model": str(on_gpu.base),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": pytest.approx(12 / 60),
    }
    assert arm.run({"base": [7, 8], "guide": [9]}, Limits(3, ignore_eos=True)).token_ids == (5, 6, 2)
    assert arm.run({"base": [7, 8], "guide": [9]}, Limits(3, ignore_eos=False)).token_ids == (5, 6)
    greedy = {"temperature": 0.0, "detokenize": False, "max_tokens": 3}
    assert module.asked == [
        ([{"prompt_token_ids": [7, 8]}], greedy | {"ignore_eos": True, "stop_token_ids": []}, False),
        ([{"prompt_token_ids": [7, 8]}], greedy | {"ignore_eos": False, "stop_token_ids": [2, 3]}, False),
    ]
    assert torch.allclose(arm.logits([[7, 8, 9]])[0], TOPS)
    (drafted,) = vllm_arms(on_gpu, lambda name: name == "vllm bf16 drafted")
    drafts = {"method": "draft_model", "model": str(on_gpu.guide), "num_speculative_tokens": 4}
    assert (drafted.name, module.opened["speculative_config"]) == ("vllm bf16 drafted", drafts)


def test_sglang_is_asked_for_the_same_tokens_and_nothing_else(
    on_gpu: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = StandIn("sglang")
    monkeypatch.setitem(sys.modules, "sglang", module)
    (arm,) = sglang_arms(on_gpu, lambda name: True)
    assert module.opened == {
        "model_path": str(on_gpu.base),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "mem_fraction_static": pytest.approx(8 / 40),
    }
    assert arm.run({"base": [7, 8], "guide": [9]}, Limits(3, ignore_eos=True)).token_ids == (5, 6, 2)
    assert arm.run({"base": [7, 8], "guide": [9]}, Limits(3, ignore_eos=False)).token_ids == (5, 6)
    greedy = {"temperature": 0.0, "max_new_tokens": 3}
    assert [dict(one) for one in module.asked] == [
        {"input_ids": [7, 8], "sampling_params": greedy | {"ignore_eos": True}},
        {"input_ids": [7, 8], "sampling_params": greedy | {"ignore_eos": False, "stop_token_ids": [2, 3]}},
    ]
    assert torch.allclose(arm.logits([[7, 8, 9]])[0], TOPS)
    assert sglang_arms(on_gpu, lambda name: False) == []
