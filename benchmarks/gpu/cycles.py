"""Whole cycles of drafting and verifying: one on the device, one behind the other, and what a text gains."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from benchmarks.gpu.ceilings import micro
from benchmarks.gpu.pairs import Pair
from benchmarks.gpu.parts import Figure, Found
from benchmarks.gpu.passes import Load, Model
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import recorder_of, time_on_device, time_on_host
from benchmarks.pair import pocket_prompts
from benchmarks.report import quartiles
from nudging import LLM, Nudging, SamplingParams
from nudging.cycle import CycleShape, LaneStart, RecordedCycle, Said
from nudging.cycle import Model as CycleModel
from nudging.graph_runner import GraphRunner
from nudging.models.decoder import Decoder

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
        self.recorded = RecordedCycle(*parts, shape, vocab, marks, recorder_of(device))
        blocks = [range(seq * base.width, (seq + 1) * base.width) for seq in range(seqs)]
        self.tables = [(list(own), list(own)) for own in blocks]
        self.lanes = [
            LaneStart(0, behind, 300, 301, 1, 1, context, context, drafts, 0, 0.4, False, True, 0.0, 0)
        ] * seqs

    def bound(self, drafts: int, bandwidth: float) -> float:
        """Seconds to read the guide's weights for each draft and the base's once."""
        base, guide = (model.num_bytes for model in self.models)
        return (drafts * guide + base) / bandwidth

    def once(self) -> Said:
        """A cycle from the beginning, waited for."""
        return self.recorded.start(self.tables, self.lanes)()

    def behind_each_other(self) -> None:
        """A run of cycles, each read once the next one is on its way."""
        said: Callable[[], Said] = self.recorded.start(self.tables, self.lanes)
        for _ in range(RUN - 1):
            next_said = self.recorded.start(self.tables)
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
    """One request, nudged by token: tokens per second with whole cycles and without; and how much longer a
    step takes in which the author changes.
    """
    figures = []
    prompts = dict(pocket_prompts(pair.llm, 1)[0])
    for drafts in pair.scale.drafts:
        for name in ("passes", "cycles"):
            with pair.open() as llm:
                if name == "passes":
                    without_cycles(llm)
                params = SamplingParams(max_tokens=pair.scale.tokens, ignore_eos=True)
                runs = [steps_of(llm, prompts, params, drafts) for _ in range(2 + pair.scale.rounds)][2:]
            rates = [run[-1].tokens / run[-1].seconds for run in runs]
            lower, median, upper = quartiles(rates)
            what = f"token-level text by {name}, {drafts} drafts"
            figures.append(Figure(what, median, "tok/s", None, lower, upper))
            steps = [step for run in runs for step in pairwise(run)]
            seconds = {
                changes: [
                    b.seconds - a.seconds for a, b in steps if (len({a.last, *b.authors}) > 1) is changes
                ]
                for changes in (True, False)
            }
            if all(seconds.values()):
                extra = quartiles(seconds[True])[1] - quartiles(seconds[False])[1]
                figures.append(Figure(f"step in which authors change, {what}", 1e6 * extra, "us longer"))
    return figures


def without_cycles(llm: LLM) -> None:
    """Let the models' passes be recorded one by one."""
    for runner in llm._engine.runners.values():
        if isinstance(runner, GraphRunner):
            runner.foresight = None


class Written(NamedTuple):
    """What a reader has of a text: when, how many tokens, who wrote the new ones, and who the last one."""

    seconds: float
    tokens: int
    authors: tuple[str, ...]
    last: str


def steps_of(llm: LLM, prompts: dict[str, list[int]], params: SamplingParams, drafts: int) -> list[Written]:
    """A text, step by step, by the clock."""
    began, tokens = time.perf_counter(), 0
    steps: list[Written] = []
    for delta in llm.submit(prompts, params, POLICY, drafts):
        if delta.token_ids:
            tokens += len(delta.token_ids)
            now = time.perf_counter() - began
            steps.append(Written(now, tokens, delta.authors, delta.authors[-1]))
    return steps
