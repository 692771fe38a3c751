"""A base and its guide, made in memory: what texts cost in every way of nudging, alone and together."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.arms.arm import Arm, Limits, Prompts
from benchmarks.arms.ours import EngineArm
from benchmarks.batch import Texts, batch_arms, measure_size
from benchmarks.gpu.agreement import amount_for, disturbed
from benchmarks.gpu.goals import OVER_BOTH
from benchmarks.gpu.parts import Figure, Found
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import rehearsed_runner
from benchmarks.inflate import inflate_checkpoint, inflate_model
from benchmarks.pair import agreement, pass_bytes, pocket_prompts
from benchmarks.report import figures
from benchmarks.rounds import Record, run_rounds
from nudging import LLM, Base, Guide, LoadedModel, Nudging, SamplingParams
from nudging.api.loading import resolve
from nudging.executor.model_runner import block_bytes

POLICY = Nudging(0.4, "word")
TOKEN = Nudging(0.4, "token")


class Pair:
    """One pair and the LLM that is open on it, from its first use on."""

    def __init__(
        self, shapes: tuple[Mapping[str, Any], ...], device: torch.device, scale: Scale, folder: Path
    ):
        self._shapes, self.device, self.scale, self.folder = shapes, device, scale, folder
        self._models: list[LoadedModel] = []
        self._llm: LLM | None = None
        self._expected: dict[str, Texts] = {}
        self._written = False

    @property
    def models(self) -> list[LoadedModel]:
        """Base and guide, inflated on the device."""
        if not self._models:
            made = zip(("base", "guide"), self._shapes, strict=True)
            self._models = [
                inflate_model(resolve(f"pocket:{role}"), self.folder / role, shape, device=self.device)
                for role, shape in made
            ]
        return self._models

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            self._llm = self.open()
        return self._llm

    def open(self, **options: Any) -> LLM:
        """Nothing is recorded ahead: it would be measured, too, and CUDA lets nobody wait for the device
        meanwhile.  On a CPU it runs as on a GPU, from what stands for recordings.
        """
        memory = self.scale.kv_cache
        options = {"kv_cache_memory": memory, "progress": False, "record_ahead": False} | options
        if self.device.type == "cuda":
            return LLM(*self.models, device=str(self.device), **options)
        with mock.patch("nudging.api.loading.make_runner", rehearsed_runner):
            return LLM(*self.models, device=str(self.device), **options)

    def checkpoints(self) -> tuple[Path, Path]:
        """The same base and guide as files, written once."""
        if not self._written:
            for role, shape in zip(("base", "guide"), self._shapes, strict=True):
                inflate_checkpoint(resolve(f"pocket:{role}"), self.folder / role, shape, device=self.device)
            self._written = True
        return self.folder / "base", self.folder / "guide"

    def close(self) -> None:
        """Give the memory back."""
        if self._llm is not None:
            self._llm.close()
        self._llm, self._models = None, []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def arms(self, context: int | None, bandwidth: float) -> Found:
        """One request at a time; the nudged texts of all arms are held to be one, byte for byte.

        `context`: tokens before the question, None for the question alone.
        """
        prompts = pocket_prompts(self.llm, self.scale.questions)
        if context is None:
            return self._measure(self.llm, prompts, bandwidth, self.scale.drafts)
        prompts = [lengthened(prompt, context) for prompt in prompts]
        return self._measure(self.llm, prompts, bandwidth, self.scale.drafts[-2:-1])

    def less_agreement(self, share: float, bandwidth: float) -> Found:
        """The same of a guide that is disturbed until it agrees at `share` of the base's tokens only."""
        guide, limits = self.models[1], Limits(self.scale.tokens, True)
        with self.open() as llm:
            prompts = pocket_prompts(llm, self.scale.questions)
            lazy = EngineArm("lazy", "nudged", llm, POLICY, "off")
            amount = amount_for(share, llm, guide, lazy, prompts, limits)
            with disturbed(guide, amount):
                found = self._measure(llm, prompts, bandwidth, self.scale.drafts)
        found.details["disturbance"] = amount
        return found

    def _measure(self, llm: LLM, prompts: list[Prompts], bandwidth: float, drafts: tuple[int, ...]) -> Found:
        """Every way of nudging by word and by token beside the models alone."""
        scale, arms = self.scale, list[Arm]()
        arms += [EngineArm("base alone", "base", llm, Base(), "off")]
        arms += [EngineArm("guide alone", "guide", llm, Guide(), "off")]
        for policy, text, by in ((POLICY, "nudged", ""), (TOKEN, "by token", " by token")):
            arms.append(EngineArm(f"lazy{by}", text, llm, policy, "off"))
            arms += [EngineArm(f"speculative{by} k={k}", text, llm, policy, k) for k in drafts]
            arms.append(EngineArm(f"adaptive{by}", text, llm, policy, "auto"))
        run = run_rounds(arms, prompts, Limits(scale.tokens, True), scale.rounds, seed=0)
        sizes = {
            role: pass_bytes(llm, role) + self._kv_bytes(llm, role, prompts) for role in ("base", "guide")
        }
        found = arm_figures(run.records, sizes, bandwidth)
        agreed = agreement(llm, prompts, run.records)
        if agreed is not None:
            found.figures.append(Figure("agreement where the base is sure", agreed, ""))
        return found

    def _kv_bytes(self, llm: LLM, role: str, prompts: list[Prompts]) -> int:
        """Bytes of keys and values that a pass reads in the middle of a text."""
        runner = llm._engine.runners[llm.roles[role].model]
        size = runner.pool.block_size
        length = statistics.mean(len(prompt[role]) for prompt in prompts) + self.scale.tokens / 2
        return int(length * block_bytes(runner.decoder, size) / size)

    def batch(self, size: int, bandwidth: float) -> Found:
        """Many requests at once, each held to what it wrote in smaller batches."""
        scale = self.scale
        arms = batch_arms(self.llm, POLICY)
        prompts, limits = pocket_prompts(self.llm, max(scale.batches))[:size], Limits(scale.tokens, True)
        rounds = max(1, scale.rounds - 2)
        points = measure_size(arms, prompts, limits, rounds, random.Random(size), self._expected)
        base = pass_bytes(self.llm, "base")
        found = Found(details={"points": [asdict(point) for point in points]})
        for point in points:
            # A pass of the base gives one token to each text; a draft gives more.
            bound = size * bandwidth / base if point.arm == "base alone" else None
            spread = (point.lower_quartile, point.upper_quartile)
            what = f"{point.arm}, {size} at once ({point.to_base:.2f} x base)"
            found.figures.append(Figure(what, point.tokens_per_second, "tok/s", bound, *spread))
            if point.arm == "adaptive":
                over = min(point.to_lazy, point.to_base / 0.97)
                found.figures.append(Figure(f"{OVER_BOTH}, {size} at once", over, "x"))
        return found

    def idle(self) -> Found:
        """How much of the time that texts are written somebody computes, by the engine's own trace."""
        found = Found()
        path = self.folder / "trace.json"
        params = SamplingParams(max_tokens=self.scale.tokens, ignore_eos=True)
        for name, policy, speculate in (("base alone", Base(), "off"), ("adaptive", POLICY, "auto")):
            with self.open(trace=path) as llm:
                prompts = dict(pocket_prompts(llm, 1)[0])
                for _ in range(3):  # the last one replays what the first ones recorded
                    llm.generate(prompts, params, policy, speculate)
            share = share_in_passes(json.loads(path.read_text()))
            found.figures.append(Figure(f"time in passes, {name}", share, "", bound=1.0))
        return found


def lengthened(prompts: Prompts, context: int) -> Prompts:
    """The prompts with copies of themselves before them, `context` tokens in all."""
    return {role: (ids * (context // len(ids) + 1))[-context:] for role, ids in prompts.items()}


def arm_figures(records: list[Record], sizes: Mapping[str, int], bandwidth: float) -> Found:
    """Tokens per second of every arm; the bound is by `sizes`, the bytes of weights and cache that a pass
    reads.
    """
    listed = figures(records, sizes, bandwidth)
    found = Found(details={"arms": [asdict(one) for one in listed]})
    for one in listed:
        bound = None if one.bandwidth is None else one.tokens_per_second / one.bandwidth
        spread = (one.lower_quartile, one.upper_quartile)
        what = one.name if one.relative is None else f"{one.name} ({one.relative:.2f} x base)"
        found.figures.append(Figure(what, one.tokens_per_second, "tok/s", bound, *spread))
    return found


def share_in_passes(events: list[dict[str, Any]]) -> float:
    """Of the time of the last request, the share that is inside passes."""
    last = max(e["ts"] for e in events if e["ph"] == "b")
    spans = [e for e in events if e["ph"] == "X" and e["ts"] >= last]
    passes = [e for e in spans if e["name"] == "pass"]
    whole = max(e["ts"] + e["dur"] for e in spans) - last
    return float(sum(e["dur"] for e in passes) / whole)
