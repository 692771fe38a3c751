"""What a step costs on the host: the time of `Engine.step` outside the models' forward passes.

    python -m benchmarks.host_cost            # the pocket pair
    python -m benchmarks.host_cost --instant  # models that answer at once, for the bookkeeping alone
    nudging bench host

A step makes one pass of each model that is needed, or several of the guide where it writes a path.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.pair import RESULTS, WIDTH, device_name
from benchmarks.report import quartiles
from nudging import Base, Nudging, SamplingParams
from nudging.api.loading import load_roles, make_runners
from nudging.core.engine import Engine
from nudging.core.request import Request
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache
from nudging.policies.protocol import Policy
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role

ARMS: dict[str, tuple[Policy, int | None]] = {
    "base alone": (Base(), 0),
    "token, lazy": (Nudging(0.4, "token"), 0),
    "token, k=4": (Nudging(0.4, "token"), 4),
    "word, lazy": (Nudging(0.4, "word"), 0),
    "word, k=4": (Nudging(0.4, "word"), 4),
    "token, adaptive": (Nudging(0.4, "token"), None),
    "word, adaptive": (Nudging(0.4, "word"), None),
}


class Timed:
    """A decoder with a watch: how many passes it made, and how long they took."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.config, self.weight_bytes = decoder.config, decoder.weight_bytes
        self.head_share = decoder.head_share
        self.dtype, self.device = decoder.dtype, decoder.device
        self.passes, self.seconds = 0, 0.0

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        began = time.perf_counter()
        logits = self.answer(batch, kv)
        self.seconds += time.perf_counter() - began
        self.passes += 1
        return logits

    def answer(self, batch: Batch, kv: KVCache) -> Tensor:
        return self._decoder.forward(batch, kv)


def opinions(size: int, seed: int, sure: float, unsure: float) -> Tensor:
    """Logits [size, size] after each last token: one token has `sure`, for one in ten `unsure`, all others 0.
    Tables of unlike seeds differ in one token of ten.
    """
    draw = torch.Generator().manual_seed(0)
    token = torch.randint(size, (size,), generator=draw)
    draw.manual_seed(seed)
    other = torch.randint(size, (size,), generator=draw)
    token = torch.where(torch.rand(size, generator=draw) < 0.9, token, other)
    rows = torch.zeros(size, size)
    rows[torch.arange(size), token] = torch.where(torch.rand(size, generator=draw) < 0.9, sure, unsure)
    return rows


class Instant(Timed):
    """A model whose rows are a table by the last token: mostly sure, mostly of one opinion."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        super().__init__(decoder)
        self._rows = opinions(decoder.config.vocab_size, seed, 12.0, 3.0)

    def answer(self, batch: Batch, kv: KVCache) -> Tensor:
        return self._rows[batch.ids[batch.logit_rows]]


@dataclass(frozen=True)
class Point:
    """Microseconds of the host in a step (quartiles) and, on average, for each pass of a model."""

    arm: str
    requests: int
    lower_quartile: float
    median: float
    upper_quartile: float
    per_pass: float


def measure(
    roles: dict[str, Role], decoders: dict[str, Any], arm: str, requests: int, tokens: int
) -> tuple[list[float], int]:
    """Seconds of the host in every step of one run, and how many passes the models made."""
    policy, draft_len = ARMS[arm]
    engine = Engine(
        make_runners(decoders, roles, 1 << 28, 16, False, threads=1), {name: name for name in roles}
    )
    draw = random.Random(requests)
    for number in range(requests):
        prompt = draw.choices(range(256, 2000), k=24)
        prompts = {name: RolePrompt(list(prompt)) for name in roles}
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        engine.add(Request(f"{number}", policy, params, number, prompts, roles, draft_len))
    passes, times = sum(d.passes for d in decoders.values()), []
    while engine.has_work:
        inside, began = sum(d.seconds for d in decoders.values()), time.perf_counter()
        engine.step()
        took = time.perf_counter() - began
        times.append(took - (sum(d.seconds for d in decoders.values()) - inside))
    return times, sum(d.passes for d in decoders.values()) - passes


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--instant", is_flag=True, help="Models that answer at once, instead of the pocket pair.")
@click.option("--requests", "sizes", multiple=True, type=int, default=(1, 8, 64), help="At once; repeatable.")
@click.option("--tokens", default=64, help="Of each text.")
@click.option("--rounds", default=3, help="Of all arms, in random order.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="A folder for the JSON file.")
def main(instant: bool, sizes: tuple[int, ...], tokens: int, rounds: int, out: Path) -> None:
    """Measure what the host adds to the models' passes."""
    torch.set_num_threads(1)
    names: dict[str, str | os.PathLike[str]] = {"base": "pocket:base", "guide": "pocket:guide"}
    roles, opened = load_roles(names, "auto", torch.device("cpu"), progress=False, max_len=None)
    decoders = {
        name: Instant(decoder, seed) if instant else Timed(decoder)
        for seed, (name, decoder) in enumerate(opened.items(), start=1)
    }
    runs: dict[tuple[str, int], list[tuple[list[float], int]]] = {
        (arm, size): [] for arm in ARMS for size in sizes
    }
    loads = []
    for turn in range(rounds + 1):
        order = list(runs)
        random.Random(turn).shuffle(order)
        for arm, size in order:
            result = measure(roles, decoders, arm, size, tokens)
            if turn:  # the first round warms up
                runs[arm, size].append(result)
        loads.append(os.getloadavg()[0])
    points = []
    for (arm, size), listed in runs.items():
        times = [1e6 * second for run, _ in listed for second in run]
        per_pass = sum(times) / sum(passes for _, passes in listed)
        points.append(Point(arm, size, *quartiles(times), per_pass))
    show(
        points, sizes, f"host microseconds a step (a pass), {'instant models' if instant else 'pocket pair'}"
    )
    path = out / f"host-cost-{'instant' if instant else 'pocket'}.json"
    facts = {"device": device_name("cpu"), "tokens": tokens, "rounds": rounds, "load_averages": loads}
    path.write_text(json.dumps({**facts, "points": [asdict(p) for p in points]}, indent=2) + "\n")
    click.echo(f"load average {min(loads):.1f}-{max(loads):.1f}; written to {path}")


def show(points: list[Point], sizes: tuple[int, ...], title: str) -> None:
    table = Table("", *(f"{size} request{'s' * (size > 1)}" for size in sizes), title=title)
    for arm in ARMS:
        mine = {point.requests: point for point in points if point.arm == arm}
        table.add_row(arm, *(f"{mine[size].median:.0f} ({mine[size].per_pass:.0f})" for size in sizes))
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=WIDTH)).print(table)


if __name__ == "__main__":
    main()
