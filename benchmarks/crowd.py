"""What requests at once cost by their passes alone: prices of passes measured, passes counted.

    python -m benchmarks.crowd --base-shape 100m --guide-shape 10m

The host's time and the machine's other work are not in it, so it shows what a schedule costs, and it repeats.
The texts are the pocket pair's, which inflation does not change.  The bound: what lazy nudging reads and
answers, were every row as cheap as it is in the pass that is the best for it; no schedule that has to read
and answer as much is below it.
"""

from __future__ import annotations

import json
import random
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.arms.arm import Limits
from benchmarks.batch import SIZES, batch_arms, write_together
from benchmarks.inflate import SHAPES
from benchmarks.pair import RESULTS, WIDTH, device_name, inflated, pocket_prompts
from nudging import LLM, Nudging
from nudging.executor.model_runner import ModelRunner
from nudging.kernels.cpu import use_team
from nudging.kernels.softmax_stats import softmax_stats
from nudging.models.batch import Batch

ROWS = (1, 2, 4, 8, 9, 12, 16, 24, 32, 48, 64, 96, 128, 256)
# The guide as it is shipped, of two million parameters.
POCKET = "pocket"
CONTEXT = 60  # tokens before the ones that a timed pass reads


@dataclass(frozen=True)
class Prices:
    """Milliseconds of a pass of a model: of its rows, and besides of its answers, each at ROWS many."""

    rows: Sequence[float]
    answers: Sequence[float]

    def of(self, rows: float, answers: float) -> float:
        return along(self.rows, rows) + (along(self.answers, answers) if answers else 0.0)

    def record(self, rows: int, answers: int, seconds: float) -> None:
        """What the host takes for a counted pass says nothing."""

    def least(self, rows: float, answers: float) -> float:
        """The price of so many in the passes that are the best for them."""
        return sum(
            many * min(price / count for price, count in zip(prices, ROWS, strict=True))
            for many, prices in ((rows, self.rows), (answers, self.answers))
        )


def along(prices: Sequence[float], count: float) -> float:
    """The price of `count`, on straight lines between those of ROWS and beyond."""
    at = min(max(bisect_right(ROWS, count), 1), len(ROWS) - 1)
    slope = (prices[at] - prices[at - 1]) / (ROWS[at] - ROWS[at - 1])
    return prices[at - 1] + slope * (count - ROWS[at - 1])


def prices_of_pair(base_shape: str, guide_shape: str, dtype: str, turns: int) -> dict[str, Prices]:
    """What passes of the pocket pair in these shapes take here."""
    with ExitStack() as stack:
        paths = [
            stack.enter_context(inflated(f"pocket:{role}", None if shape == POCKET else shape, "cpu"))
            for role, shape in (("base", base_shape), ("guide", guide_shape))
        ]
        llm = stack.enter_context(LLM(*paths, dtype=dtype, kv_cache_memory="2GiB"))
        return {name: measure_prices(runner, turns) for name, runner in llm._engine.runners.items()}


def flat_prices() -> dict[str, Prices]:
    """Made-up prices of a device on which rows cost little, as a large pair's do on a GPU: a pass of the base
    takes 4 ms, one of the guide .45, and rows beyond sixteen and answers next to nothing.
    """
    parts = {"base": (4.0, 0.004, 0.002), "guide": (0.45, 0.0006, 0.001)}
    return {
        name: Prices([one + row * max(rows - 16, 0) for rows in ROWS], [answer * rows for rows in ROWS])
        for name, (one, row, answer) in parts.items()
    }


@dataclass
class Count:
    """The passes of one model, and what they read, answered and cost."""

    passes: int = 0
    rows: int = 0
    answers: int = 0
    cost: float = 0.0


@dataclass
class Counted:
    """One arm at one size: milliseconds a token by its passes, and its passes by model."""

    arm: str
    size: int
    cost: float = 0.0
    passes: dict[str, Count] = field(default_factory=lambda: {"base": Count(), "guide": Count()})


def step_batch(rows: int, answers: int, block_size: int) -> Batch:
    """`rows` texts of CONTEXT tokens, one more token each; of the first `answers` the rows are wanted."""
    blocks = -(-(CONTEXT + 1) // block_size)
    tables = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
    position = torch.full((rows,), CONTEXT)
    slots = tables[:, CONTEXT // block_size].long() * block_size + CONTEXT % block_size
    starts = torch.arange(rows + 1, dtype=torch.int32)
    lengths = torch.full((rows,), CONTEXT + 1, dtype=torch.int32)
    ids = torch.randint(10, 1000, (rows,))
    return Batch(ids, position, slots, starts, lengths, tables, torch.arange(answers))


def measure_prices(runner: ModelRunner, turns: int) -> Prices:
    """The quickest of `turns` passes of each size, in random order, without the host's work around them: what
    disturbs a pass only ever makes it slower.
    """
    shapes = [(rows, answers) for rows in ROWS for answers in (0, rows)]
    batches = {shape: step_batch(*shape, runner.pool.block_size) for shape in shapes}
    times: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    with torch.inference_mode(), use_team(runner.team):
        for _ in range(turns):
            for shape in random.sample(shapes, len(shapes)):
                began = time.perf_counter()
                logits = runner.decoder.forward(batches[shape], runner.cache)
                if shape[1]:
                    softmax_stats(logits)
                times[shape].append(time.perf_counter() - began)
    read = [1e3 * min(times[rows, 0]) for rows in ROWS]
    both = [1e3 * min(times[rows, rows]) for rows in ROWS]
    return Prices(read, [b - r for b, r in zip(both, read, strict=True)])


def count_passes(
    llm: LLM, prices: Mapping[str, Prices], sizes: Sequence[int], limits: Limits
) -> list[Counted]:
    """All arms at all sizes.  The adaptive one has written each batch once before: it knows the pair."""
    engine = llm._engine
    engine.costs = engine.fast_path._costs = prices  # type: ignore[assignment]
    counts: dict[str, Count] = {}

    def watch(name: str, runner: ModelRunner) -> None:
        execute = runner.execute

        def counted(works: Any, wanted: Any, lanes: Any) -> Any:
            count = counts[name]
            rows, answers = sum(w.end - w.start for w in works), sum(w.answers for w in works)
            if lanes is not None:
                rows, answers = rows + lanes.num_tokens, answers + lanes.num_answers
            count.passes += 1
            count.rows, count.answers = count.rows + rows, count.answers + answers
            count.cost += prices[name].of(rows, answers)
            return execute(works, wanted, lanes)

        runner.execute = counted  # type: ignore[method-assign]

    for name, runner in engine.runners.items():
        watch(name, runner)
    prompts, result = pocket_prompts(llm, max(sizes)), []
    for size in sizes:
        for arm in batch_arms(llm, Nudging()):
            for _ in range(2):
                entry = Counted(arm.name, size)
                counts = entry.passes
                _, texts, *_ = write_together(arm, prompts[:size], limits)
            entry.cost = sum(c.cost for c in counts.values()) / sum(len(ids) for ids, _ in texts)
            result.append(entry)
    return result


def bound(lazy: Counted, prices: Mapping[str, Prices], tokens: int) -> float:
    """Milliseconds a token below which nothing is that reads and answers what lazy nudging does."""
    return sum(prices[name].least(c.rows, c.answers) for name, c in lazy.passes.items()) / tokens


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--base-shape", type=click.Choice(list(SHAPES)), default="100m")
@click.option("--guide-shape", type=click.Choice([POCKET, *SHAPES]), default="10m", help="Or as it is.")
@click.option("--flat", is_flag=True, help="Measure nothing: rows cost little, as on a GPU (made up).")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16")
@click.option("--turns", default=12, help="Timed passes of each size.")
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES, help="A batch size; repeatable.")
@click.option("--max-tokens", default=48)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="A folder for the JSON file.")
def main(base_shape: str, guide_shape: str, dtype: str, turns: int, flat: bool, **flags: Any) -> None:
    """Price the passes of a pair and count those of all arms."""
    prices = flat_prices() if flat else prices_of_pair(base_shape, guide_shape, dtype, turns)
    pair = "flat" if flat else f"{base_shape}-{guide_shape}"
    sizes, limits = sorted(flags["sizes"]), Limits(flags["max_tokens"], ignore_eos=True)
    with LLM.pocket(kv_cache_memory="1GiB") as llm:
        counted = count_passes(llm, prices, sizes, limits)
    names = list(dict.fromkeys(entry.arm for entry in counted))
    title = f"ms a token by passes (times as fast as the base alone), {pair}, {'made up' if flat else dtype}"
    table = Table(title=title, box=SIMPLE_HEAD)
    for head in ("requests", *names, "bound"):
        table.add_column(head, justify="right", no_wrap=True)
    bounds = {}
    for size in sizes:
        of_size = {entry.arm: entry for entry in counted if entry.size == size}
        base = of_size["base alone"].cost
        bounds[size] = bound(of_size["lazy"], prices, size * limits.max_tokens)
        costs = [*(of_size[name].cost for name in names), bounds[size]]
        table.add_row(str(size), *(f"{cost:.3f} ({base / cost:.2f})" for cost in costs))
    Console(width=WIDTH).print(table)
    facts = {
        "models": None if flat else {"base": base_shape, "guide": guide_shape},
        **{"dtype": dtype, "turns": 0 if flat else turns, "max_tokens": limits.max_tokens},
        "device": "made up" if flat else device_name("cpu"),
        "threads": torch.get_num_threads(),
        "prices": {name: {"at": ROWS, **asdict(price)} for name, price in prices.items()},
        "counted": [asdict(entry) for entry in counted],
        "bounds": bounds,
    }
    flags["out"].mkdir(parents=True, exist_ok=True)
    path = flags["out"] / f"crowd-{pair}.json"
    path.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
