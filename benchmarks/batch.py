"""How much a pair writes when many requests run at once: tokens per second against the size of the batch.

    python -m benchmarks.batch --base-shape 100m --guide-shape 10m
    nudging bench batch

For each batch size all arms write the same prompts, all at once, in fresh random order every round.  What an
arm writes in a batch is held to what it wrote alone, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.arms.arm import Limits, Prompts
from benchmarks.arms.ours import EngineArm
from benchmarks.inflate import SHAPES
from benchmarks.pair import RESULTS, WIDTH, device_name, inflated, pocket_prompts
from benchmarks.report import quartiles
from benchmarks.rounds import DifferentText
from nudging import LLM, Base, Nudging, SamplingParams

SIZES = (1, 2, 4, 8, 16, 32, 64)
Texts = tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Point:
    """One arm at one batch size: tokens per second of all requests together over the rounds, and as a share
    of other arms' in the same round.
    """

    arm: str
    size: int
    tokens_per_second: float
    lower_quartile: float
    upper_quartile: float
    drafted: int
    accepted: int
    to_base: float
    to_lazy: float


def batch_arms(llm: LLM, policy: Nudging) -> list[EngineArm]:
    """The base alone, and the nudged text without drafts, with drafts of one length and with what pays."""
    return [
        EngineArm("base alone", "base", llm, Base(), "off"),
        EngineArm("lazy", "nudged", llm, policy, "off"),
        EngineArm("speculative k=4", "nudged", llm, policy, 4),
        EngineArm("adaptive", "nudged", llm, policy, "auto"),
    ]


def write_together(
    arm: EngineArm, prompts: Sequence[Prompts], limits: Limits
) -> tuple[float, Texts, int, int]:
    """Write all prompts at once: the seconds, what was written by whom, tokens drafted and accepted."""
    params = SamplingParams(max_tokens=limits.max_tokens, ignore_eos=limits.ignore_eos)
    began = time.perf_counter()
    results = arm.llm.generate([dict(p) for p in prompts], params, arm.policy, arm.speculate)
    seconds = time.perf_counter() - began
    outputs = [result.outputs[0] for result in results]
    for output in outputs:
        if output.error is not None:
            raise output.error
    texts = tuple((output.token_ids, output.authors) for output in outputs)
    return seconds, texts, sum(o.stats.drafted for o in outputs), sum(o.stats.accepted for o in outputs)


def measure_size(
    arms: Sequence[EngineArm],
    prompts: Sequence[Prompts],
    limits: Limits,
    rounds: int,
    rng: random.Random,
    expected: dict[str, Texts],
    advance: Callable[[str], None] = lambda name: None,
) -> list[Point]:
    """All arms on one batch of prompts.  `expected` has the texts of more prompts, by what arms write, from
    smaller batches.  Raises DifferentText.
    """
    speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    drafts: dict[str, tuple[int, int]] = {}
    for number in range(rounds + 1):
        for arm in rng.sample(list(arms), len(arms)):
            advance(f"{len(prompts)} x {arm.name}")
            seconds, texts, *drafts[arm.name] = write_together(arm, prompts, limits)
            check_texts(arm, texts, expected)
            if number > 0:
                speeds[arm.name].append(sum(len(ids) for ids, _ in texts) / seconds)
    return [_point(arm.name, len(prompts), speeds, drafts[arm.name]) for arm in arms]


def check_texts(arm: EngineArm, texts: Texts, expected: dict[str, Texts]) -> None:
    """Raise DifferentText where a prompt's text is not what it was in another batch or another arm."""
    known = expected.get(arm.text, ())
    for number, (now, before) in enumerate(zip(texts, known, strict=False)):
        if now != before:
            raise DifferentText(
                f"prompt {number} in a batch of {len(texts)}: {arm.name!r} wrote {now}, before {before}"
            )
    if len(texts) > len(known):
        expected[arm.text] = texts


def _point(name: str, size: int, speeds: dict[str, list[float]], drafts: Any) -> Point:
    def share(of: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[name], speeds[of], strict=True))

    lower, median, upper = quartiles(speeds[name])
    return Point(name, size, median, lower, upper, *drafts, share("base alone"), share("lazy"))


def table(points: Sequence[Point], title: str) -> Table:
    """Tokens per second of every arm by batch size, nudged arms with their share of the base alone's."""
    names = list(dict.fromkeys(point.arm for point in points))
    result = Table(title=title, box=SIMPLE_HEAD)
    for head in ("requests", *names):
        result.add_column(head, justify="right", no_wrap=True)
    for size in dict.fromkeys(point.size for point in points):
        of_size = {point.arm: point for point in points if point.size == size}
        cells = [f"{of_size[name].tokens_per_second:.0f} ({of_size[name].to_base:.2f})" for name in names]
        result.add_row(str(size), *cells)
    return result


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--base", default="pocket:base", help="A checkpoint.")
@click.option("--guide", default="pocket:guide", help="A checkpoint with the base's tokenizer.")
@click.option("--base-shape", type=click.Choice(list(SHAPES)), help="Inflate the base to this.")
@click.option("--guide-shape", type=click.Choice(list(SHAPES)), help="Inflate the guide to this.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16")
@click.option("--device", default="cpu")
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES, help="A batch size; repeatable.")
@click.option("--max-tokens", default=48)
@click.option("--rounds", default=3, help="Timed rounds, after one that is not.")
@click.option("--seed", default=0, help="Of the order of the arms.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="A folder for the JSON file.")
@click.option("--name", help="Of the JSON file; by default the shapes.")
def main(base: str, guide: str, base_shape: str | None, guide_shape: str | None, **flags: Any) -> None:
    """Measure tokens per second against the number of requests that run at once."""
    sizes, limits = sorted(flags["sizes"]), Limits(flags["max_tokens"], ignore_eos=True)
    policy, rng = Nudging(), random.Random(flags["seed"])
    points: list[Point] = []
    loads = []
    with ExitStack() as stack:
        paths = [
            stack.enter_context(inflated(name, shape, flags["device"]))
            for name, shape in ((base, base_shape), (guide, guide_shape))
        ]
        options = {"dtype": flags["dtype"], "device": flags["device"], "kv_cache_memory": "2GiB"}
        llm = stack.enter_context(LLM(*paths, **options, record_ahead=False))
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        arms, prompts, expected = batch_arms(llm, policy), pocket_prompts(llm, max(sizes)), {}
        task = progress.add_task("", total=len(sizes) * len(arms) * (flags["rounds"] + 1))

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        for size in sizes:
            loads.append(os.getloadavg()[0])
            points += measure_size(arms, prompts[:size], limits, flags["rounds"], rng, expected, advance)
    models = {"base": base_shape or base, "guide": guide_shape or guide}
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=WIDTH)
    title = f"tokens/s (times the base alone), {models['base']} + {models['guide']}, {flags['dtype']}"
    console.print(table(points, title))
    facts = {
        "models": models,
        "policy": repr(policy),
        **{key: flags[key] for key in ("dtype", "max_tokens", "rounds", "seed")},
        "device": device_name(flags["device"]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_averages": loads,
        "points": [asdict(point) for point in points],
    }
    name = flags["name"] or f"batch-{base_shape or 'pocket'}-{guide_shape or 'pocket'}"
    path = flags["out"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    console.print(f"written to {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
