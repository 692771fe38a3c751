"""The engine's own arms: one model alone, and one nudged text written in every way the engine knows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.arms.arm import Arm, Limits, Prompts, Sample
from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.policies.protocol import Policy, Step, View

FIXED = (1, 2, 4, 8)


@dataclass(frozen=True)
class Eager(Nudging):
    """Nudging as a loop over two models does it: both answer at every token, wanted or not."""

    def step(self, view: View, state: Any) -> Step:
        view.row("guide")
        return super().step(view, state)


@dataclass(frozen=True)
class EngineArm:
    """One policy of an open LLM, with drafts of a fixed length, of any that pays ("auto") or none ("off")."""

    name: str
    text: str
    llm: LLM
    policy: Policy
    speculate: str | int

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        params = SamplingParams(max_tokens=limits.max_tokens, ignore_eos=limits.ignore_eos)
        began = time.perf_counter()
        result = self.llm.generate(dict(prompts), params, self.policy, self.speculate)[0]
        seconds = time.perf_counter() - began
        output = result.outputs[0]
        if output.error is not None:
            raise output.error
        stats = output.stats
        return Sample(
            output.token_ids,
            seconds,
            output.authors,
            stats.base_passes,
            stats.guide_passes,
            stats.drafted,
            stats.accepted_lengths,
        )


def engine_arms(llm: LLM, looking_up: LLM, policy: Nudging) -> list[Arm]:
    """All arms of ours; `looking_up` is open on the same pair with the n-gram drafter."""
    eager = Eager(policy.threshold, policy.granularity, policy.comparator)
    fixed = [EngineArm(f"speculative k={k}", "nudged", llm, policy, k) for k in FIXED]
    return [
        EngineArm("base alone", "base", llm, Base(), "off"),
        EngineArm("base alone, n-gram", "base", looking_up, Base(), "auto"),
        EngineArm("guide alone", "guide", llm, Guide(), "off"),
        EngineArm("eager", "nudged", llm, eager, "off"),
        EngineArm("lazy", "nudged", llm, policy, "off"),
        *fixed,
        EngineArm("adaptive", "nudged", llm, policy, "auto"),
        EngineArm("adaptive, n-gram", "nudged", looking_up, policy, "auto"),
    ]
