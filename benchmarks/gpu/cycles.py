"""Whole cycles of drafting and verifying: one on the device, one behind the other, and what a text gains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.gpu.ceilings import micro
from benchmarks.gpu.pairs import Pair
from benchmarks.gpu.parts import Figure, Found
from benchmarks.gpu.passes import Load, Model
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import recorder_of, time_on_device, time_on_host, wait
from benchmarks.pair import pocket_prompts
from benchmarks.report import quartiles
from benchmarks.rounds import DifferentText
from nudging import LLM, Base, Nudging, SamplingParams
from nudging.executor.cycles.recorded_cycle import (
    CycleShape,
    RecordedCycle,
    Said,
    SlotBlocks,
    SlotStart,
    cycle_memory,
)
from nudging.executor.cycles.recorded_cycle import Model as CycleModel
from nudging.executor.graph_runner import GraphRunner
from nudging.models.decoder import Decoder
from nudging.policies import Policy

POLICY = Nudging(0.4, "token")
# Cycles that follow each other without a pause, for the time between them.
RUN = 16


class Cycle:
    """A recorded cycle over noise: texts of `seqs` that end nowhere."""

    def __init__(self, models: list[Decoder], seqs: int, drafts: int, scale: Scale) -> None:
        # What a run writes, and the runs after it, has to fit.
        context, behind = scale.contexts[0], (RUN + scale.repeats + 2) * (drafts + 1)
        self.models = [Model(decoder, Load(seqs, 1, context + behind)) for decoder in models]
        base, guide = self.models
        shape = CycleShape(seqs, drafts, guide.width, base.width)
        device, vocab = base.decoder.device, min(decoder.config.vocab_size for decoder in models)
        marks = torch.zeros(vocab, dtype=torch.uint8, device=device)
        parts = (CycleModel(model.decoder, model.cache) for model in (guide, base))
        memory = cycle_memory(seqs, device)
        self.recorded = RecordedCycle(*parts, shape, vocab, marks, memory, recorder_of(device))
        blocks = [range(seq * base.width, (seq + 1) * base.width) for seq in range(seqs)]
        self.blocks = [SlotBlocks(drafts, own, own) for own in blocks]
        self.slots = [
            SlotStart(0, behind, 300, 301, 1, 1, context, context, 0, 0.4, False, True, 0.0, 0)
        ] * seqs

    def bound(self, drafts: int, bandwidth: float) -> float:
        """Seconds to read the guide's weights for each draft and the base's once."""
        base, guide = (model.num_bytes for model in self.models)
        return (drafts * guide + base) / bandwidth

    def once(self) -> Said:
        """A cycle from the beginning, waited for."""
        return self.recorded.start(self.blocks, self.slots)()

    def behind_each_other(self) -> None:
        """A run of cycles, each read once the next one is on its way."""
        said: Callable[[], Said] = self.recorded.start(self.blocks, self.slots)
        for _ in range(RUN - 1):
            next_said = self.recorded.start(self.blocks)
            said()
            said = next_said
        said()


@torch.inference_mode()
def cycles(pair: Pair, bandwidth: float) -> Found:
    """Cycles by themselves, for one text and for many; then texts with cycles and without."""
    found, scale, device = Found(), pair.scale, pair.device
    models = [model.decoder for model in pair.models]
    for seqs in dict.fromkeys((1, scale.batches[-1] // 4 or 1)):
        for drafts in scale.drafts:
            cycle = Cycle(models, seqs, drafts, scale)
            what = f"{drafts} drafts of {seqs} texts"
            bound = cycle.bound(drafts, bandwidth)
            cycle.once()
            alone = time_on_device(cycle.recorded.replay, device, scale.repeats)
            found.figures.append(micro(f"cycle recorded: {what}", alone, bound))
            found.figures.append(
                micro(f"cycle waited for: {what}", time_on_host(cycle.once, device, scale.repeats))
            )
            spread = time_on_host(cycle.behind_each_other, device, scale.repeats)
            lower, median, upper = (one / RUN for one in spread)
            found.figures.append(micro(f"cycle behind another one: {what}", (lower, median, upper), bound))
            found.figures.append(
                Figure(f"pause between cycles: {what}", 1e6 * (median - alone[1]), "us longer")
            )
    found.figures += texts(pair)
    return found


def texts(pair: Pair) -> list[Figure]:
    """One request, nudged by token or by the base alone: tokens per second with whole cycles and without; and
    how much longer a step takes in which the author changes.
    """
    prompts = dict(pocket_prompts(pair.llm, 1)[0])
    params = SamplingParams(max_tokens=pair.scale.tokens, ignore_eos=True)
    arms: list[tuple[Policy, int | str]] = [(POLICY, drafts) for drafts in pair.scale.drafts]
    arms += [(POLICY, "auto"), (Base(), "off")]
    figures = []
    for policy, speculate in arms:
        text = "base alone" if isinstance(policy, Base) else "token-level text"
        drafts = {"off": "", "auto": ", drafts as they pay"}.get(str(speculate), f", {speculate} drafts")
        expected = pair.llm.generate(prompts, params, policy, "off")[0].outputs[0].token_ids
        for name in ("passes", "cycles"):
            with pair.open() as llm, Pauses(pair.device) as pauses:
                if name == "passes":
                    without_cycles(llm)
                runs = []
                for _ in range(2 + pair.scale.rounds):
                    pauses.clear()
                    runs.append(steps_of(llm, prompts, params, policy, speculate))
            if any(run[-1].token_ids != expected for run in runs):
                raise DifferentText(f"{text} by {name}{drafts}: {runs[0][-1].token_ids}, lazily {expected}")
            del runs[:2]
            what = f"{text} by {name}{drafts}"
            if pauses.share is not None:
                figures.append(Figure(f"device idle between cycles, {what}", pauses.share, ""))
            rates = [len(run[-1].token_ids) / run[-1].seconds for run in runs]
            lower, median, upper = quartiles(rates)
            figures.append(Figure(what, median, "tok/s", None, lower, upper))
            figures += changes(runs, what)
    return figures


def changes(runs: Sequence[list[Written]], what: str) -> list[Figure]:
    """How much longer a step takes in which the author changes, where there are such steps and others."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for run in runs:
        for a, b in pairwise(run):
            seconds[len({a.last, *b.authors}) > 1].append(b.seconds - a.seconds)
    if not all(seconds.values()):
        return []
    extra = quartiles(seconds[True])[1] - quartiles(seconds[False])[1]
    return [Figure(f"step in which authors change, {what}", 1e6 * extra, "us longer")]


class Pauses:
    """Inside, cycles are timed by the device's own clock; what it does between them is little more than
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, Any]] = []

    def __enter__(self) -> Pauses:
        launch = RecordedCycle._launch

        def timed(cycle: RecordedCycle, *args: Any) -> None:
            began = self._mark()
            launch(cycle, *args)
            self._marks.append((began, self._mark()))

        self._patch = mock.patch.object(RecordedCycle, "_launch", timed)
        self._patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.stop()

    def clear(self) -> None:
        self._marks.clear()

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3

    @property
    def share(self) -> float | None:
        """Of the time from the first cycle to the end of the last, what lay between cycles; None where there
        are not two.
        """
        if len(self._marks) < 2:
            return None
        wait(self._device)
        paused = sum(self._between(a[1], b[0]) for a, b in pairwise(self._marks))
        return paused / self._between(self._marks[0][0], self._marks[-1][1])


def without_cycles(llm: LLM) -> None:
    """Let the models' passes be recorded one by one."""
    for runner in llm._engine.runners.values():
        if isinstance(runner, GraphRunner):
            runner.overlaps.clear()


class Written(NamedTuple):
    """What a reader has of a text: when, which tokens, who wrote the new ones, and who the last one."""

    seconds: float
    token_ids: tuple[int, ...]
    authors: tuple[str, ...]
    last: str


def steps_of(
    llm: LLM, prompts: dict[str, list[int]], params: SamplingParams, policy: Policy, speculate: int | str
) -> list[Written]:
    """A text, step by step, by the clock."""
    began, token_ids = time.perf_counter(), ()
    steps: list[Written] = []
    for delta in llm.submit(prompts, params, policy, speculate):
        if delta.token_ids:
            token_ids += tuple(delta.token_ids)
            now = time.perf_counter() - began
            steps.append(Written(now, token_ids, delta.authors, delta.authors[-1]))
    return steps
