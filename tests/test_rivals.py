"""Rivals hold the model that ours holds, are chosen by name, and say why they are not there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.arms.arm import Limits, Prompts, Sample, Setting, up_to_end
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
    assert there.obstacle(replace(setting, device=torch.device("cuda"))) is not None
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
