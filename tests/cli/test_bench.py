"""The benchmark measures what it says: arms interleaved, texts compared, figures from what was counted."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import batch
from benchmarks.arms.arm import Limits, Prompts, Sample
from benchmarks.arms.ours import EngineArm
from benchmarks.bandwidth import read_bandwidth
from benchmarks.report import add_up, figures, quartiles
from benchmarks.rounds import DifferentText, run_rounds
from nudging import LLM, Base

LIMITS = Limits(max_tokens=4, ignore_eos=False)
PROMPTS: list[Prompts] = [{"base": [1], "guide": [1]}, {"base": [2], "guide": [2]}]


@dataclass
class FakeArm:
    """Writes the same tokens at every call, in the given seconds, and says when it was called."""

    name: str
    text: str | None
    tokens: tuple[int, ...] = (1, 2, 3, 4)
    seconds: float = 1.0
    calls: list[str] = field(default_factory=list)

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        self.calls.append(self.name)
        return Sample(self.tokens, self.seconds, ("base",) * len(self.tokens), 2, 1, 4, (1, 2))


def test_arms_are_interleaved_in_fresh_order_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    arms = [FakeArm(name, "base", calls=calls) for name in "abcd"]
    probes = iter(range(10))
    run = run_rounds(arms, PROMPTS, LIMITS, 3, seed=0, probe=lambda: float(next(probes)))
    assert [len(record.rounds) for record in run.records] == [3] * 4
    assert all(len(samples) == len(PROMPTS) for record in run.records for samples in record.rounds)
    orders = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(orders) == (3 + 1) * len(PROMPTS), "one warm-up round"
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 3, "the order is drawn anew"
    assert run.probes == [1, 2, 3]
    assert len(run.load_averages) == 3


def test_arms_that_must_write_one_text_and_do_not_stop_the_benchmark() -> None:
    right, wrong = FakeArm("lazy", "nudged"), FakeArm("adaptive", "nudged", tokens=(1, 2, 9, 4))
    with pytest.raises(DifferentText, match="must write the same nudged text"):
        run_rounds([right, wrong], PROMPTS, LIMITS, 1, seed=0)
    rival, other = FakeArm("rival", None, tokens=(7,)), FakeArm("base alone", "base", tokens=(8,))
    run_rounds([right, rival, other], PROMPTS, LIMITS, 1, seed=0)


def test_figures_are_those_of_the_samples() -> None:
    arms = [FakeArm("base alone", "base", seconds=2.0), FakeArm("lazy", "nudged", seconds=1.0)]
    run = run_rounds(arms, PROMPTS, LIMITS, 3, seed=0)
    alone, lazy = figures(run.records, {"base": 100, "guide": 10}, bandwidth=1000.0)
    assert (alone.tokens_per_second, lazy.tokens_per_second, lazy.relative) == (2.0, 4.0, 2.0)
    assert (lazy.base_passes_per_token, lazy.guide_passes_per_token) == (0.5, 0.25)
    assert lazy.bandwidth == pytest.approx((2 * 100 + 1 * 10) / 1.0 / 1000.0)
    assert (lazy.drafted, lazy.accepted, lazy.accepted_lengths) == (8, 4, (2, 4))
    assert lazy.same_text == 1.0
    assert lazy.nudge_rate == 0.0


def test_quartiles_and_histograms() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert add_up([(1, 2), (), (0, 1, 5)]) == (1, 3, 5)


def test_bandwidth_is_of_this_world() -> None:
    assert 1e8 < read_bandwidth(torch.device("cpu"), 1 << 24) < 1e13


def measure_pocket_pair(out: Path, *flags: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What the command writes, its arms by name, and what it prints."""
    command = [sys.executable, "-m", "benchmarks.pair", "--rounds", "1", "--questions", "2"]
    command += ["--max-tokens", "24", "--out", str(out), "--name", "short", *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, check=True, capture_output=True, text=True
    )
    result = json.loads((out / "short.json").read_text())
    return result, {arm["name"]: arm for arm in result["arms"]}, done.stdout


def test_the_pocket_pair_is_measured_by_one_command(tmp_path: Path) -> None:
    result, arms, printed = measure_pocket_pair(tmp_path)
    assert all(name in printed for name in arms)
    assert {"base alone", "guide alone", "eager", "lazy", "speculative k=4", "adaptive"} <= set(arms)
    assert "transformers bf16 assisted" in arms
    assert result["rivals"]["transformers fp32"]["argmax"] >= 0.95
    assert all(f"{name} was not run: {reason}" in printed for name, reason in result["left_out"].items())
    assert all(arm["tokens"] == 2 * 24 for arm in arms.values()), "all texts are equally long"
    assert arms["eager"]["guide_passes_per_token"] >= 1
    assert arms["eager"]["guide_passes_per_token"] > arms["lazy"]["guide_passes_per_token"]
    assert arms["speculative k=8"]["base_passes_per_token"] < 0.7 < arms["lazy"]["base_passes_per_token"]
    assert arms["speculative k=4"]["drafted"] > 0
    assert 0 < result["agreement"] <= 1
    assert len(result["load_averages"]) == len(result["read_bandwidths"]) == 1


def test_batches_of_every_size_are_measured_by_one_command(tmp_path: Path) -> None:
    arguments = ["--size", "1", "--size", "3", "--rounds", "1", "--max-tokens", "8"]
    done = CliRunner().invoke(batch.main, [*arguments, "--out", str(tmp_path), "--name", "short"])
    assert done.exit_code == 0, done.output
    points = json.loads((tmp_path / "short.json").read_text())["points"]
    arms = ["base alone", "lazy", "speculative k=4", "adaptive"]
    assert [(p["arm"], p["size"]) for p in points] == [(arm, size) for size in (1, 3) for arm in arms]
    assert all(p["tokens_per_second"] > 0 for p in points)
    assert all(p["to_base"] == 1 for p in points if p["arm"] == "base alone")
    assert all(p["to_lazy"] == 1 for p in points if p["arm"] == "lazy")
    assert all((p["drafted"] > 0) == p["arm"].startswith("spec") for p in points if p["arm"] != "adaptive")
    assert "speculative k=4" in done.output


def test_a_text_that_is_another_one_in_a_batch_stops_the_benchmark() -> None:
    with LLM.pocket() as llm:
        arm = EngineArm("base alone", "base", llm, Base(), "off")
        prompts = batch.pocket_prompts(llm, 2)
        expected: dict[str, batch.Texts] = {}
        _, texts, *_ = batch.write_together(arm, prompts[:1], LIMITS)
        batch.check_texts(arm, texts, expected)
        _, both, *_ = batch.write_together(arm, prompts, LIMITS)
        batch.check_texts(arm, both, expected)
        assert expected["base"] == both
        with pytest.raises(DifferentText, match="prompt 0 in a batch of 2"):
            batch.check_texts(arm, (both[1], both[0]), expected)


def test_texts_that_may_end_are_the_same_and_only_chosen_arms_run(tmp_path: Path) -> None:
    flags = ("--natural-ends", "--dtype", "float32", "--arm", "base alone", "--arm", "transformers fp32")
    result, arms, printed = measure_pocket_pair(tmp_path, *flags)
    assert set(arms) == {"base alone", "transformers fp32"}
    assert arms["transformers fp32"]["same_text"] == 1.0
    assert arms["transformers fp32"]["tokens"] == arms["base alone"]["tokens"] < 2 * 24
    assert result["agreement"] is None
    assert "nan" not in printed
