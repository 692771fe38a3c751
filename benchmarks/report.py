"""From samples to figures, a table and a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.arms.arm import Sample
from benchmarks.rounds import Record

REFERENCE = "base alone"


@dataclass(frozen=True)
class Figures:
    """One arm's.  Speeds are tokens per second from prompt to last token: median and quartiles over rounds.

    `relative` is the median over rounds of the speed relative to the base alone in the same round.
    `bandwidth`: bytes of weights that its passes read, per second, as a share of what the device can read.
    `accepted_lengths[n]`: drafts of which n tokens became text.  `same_text`: share of the prompts with the
    base alone's text.  None where an arm has no such thing.
    """

    name: str
    tokens_per_second: float
    lower_quartile: float
    upper_quartile: float
    relative: float | None
    tokens: int
    base_passes_per_token: float | None
    guide_passes_per_token: float | None
    bandwidth: float | None
    drafted: int
    accepted: int
    accepted_lengths: tuple[int, ...]
    nudge_rate: float | None
    same_text: float | None


def figures(records: Sequence[Record], pass_bytes: Mapping[str, int], bandwidth: float) -> list[Figures]:
    """Every arm's; `pass_bytes` is what one pass of each role reads, `bandwidth` in bytes per second."""
    reference = next((r for r in records if r.arm.name == REFERENCE), None)
    return [_figures(record, reference, pass_bytes, bandwidth) for record in records]


def _figures(
    record: Record, reference: Record | None, pass_bytes: Mapping[str, int], bandwidth: float
) -> Figures:
    speeds = [_speed(samples) for samples in record.rounds]
    lower, median, upper = quartiles(speeds)
    samples = record.rounds[0]
    tokens = sum(len(s.token_ids) for s in samples)
    base, guide = _total(s.base_passes for s in samples), _total(s.guide_passes for s in samples)
    read = relative = same = None
    if base is not None and guide is not None:
        num_bytes = base * pass_bytes["base"] + guide * pass_bytes["guide"]
        read = num_bytes / tokens * median / bandwidth
    if reference is not None:
        pairs = zip(speeds, reference.rounds, strict=True)
        relative = statistics.median(speed / _speed(others) for speed, others in pairs)
        same = statistics.mean(
            a.token_ids == b.token_ids for a, b in zip(samples, reference.rounds[0], strict=True)
        )
    authors = [author for s in samples for author in s.authors]
    histogram = add_up(s.accepted_lengths for s in samples)
    return Figures(
        record.arm.name,
        median,
        lower,
        upper,
        relative,
        tokens,
        None if base is None else base / tokens,
        None if guide is None else guide / tokens,
        read,
        sum(s.drafted for s in samples),
        sum(n * count for n, count in enumerate(histogram)),
        histogram,
        statistics.mean(author != "base" for author in authors) if authors else None,
        same,
    )


def _speed(samples: Sequence[Sample]) -> float:
    return sum(len(s.token_ids) for s in samples) / sum(s.seconds for s in samples)


def _total(passes: Any) -> int | None:
    counts = list(passes)
    return None if None in counts else sum(counts)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def add_up(histograms: Any) -> tuple[int, ...]:
    """Histograms of any lengths, added."""
    listed = list(histograms)
    length = max(map(len, listed), default=0)
    return tuple(sum(h[n] for h in listed if n < len(h)) for n in range(length))


def table(listed: Sequence[Figures], title: str) -> Table:
    """The figures, for a terminal.

    base/t, guide/t: passes per token; of read: weights read per second as a share of what the device can
    read; taken: drafted tokens that became text; = base: texts equal to the base alone's.
    """
    heads = ("arm", "tok/s", "quartiles", "x base", "base/t", "guide/t", "of read", "taken", "nudged",
             "= base")  # fmt: skip
    result = Table(title=title, box=SIMPLE_HEAD)
    for head in heads:
        result.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True)
    for f in listed:
        result.add_row(
            f.name,
            _speed_cell(f.tokens_per_second),
            f"{_speed_cell(f.lower_quartile)}-{_speed_cell(f.upper_quartile)}",
            _cell(f.relative, ".2f"),
            _cell(f.base_passes_per_token, ".2f"),
            _cell(f.guide_passes_per_token, ".2f"),
            _cell(f.bandwidth, ".0%"),
            f"{f.accepted}/{f.drafted}" if f.drafted else "",
            _cell(f.nudge_rate, ".0%"),
            _cell(f.same_text, ".0%"),
        )
    return result


def _speed_cell(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write(listed: Sequence[Figures], facts: Mapping[str, Any], path: Path) -> None:
    """The figures and what is to know about the run, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**facts, "arms": [asdict(f) for f in listed]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def show(console: Console, listed: Sequence[Figures], facts: Mapping[str, Any], title: str) -> None:
    """The table, and under it what all arms share and what is to know of the rivals."""
    console.print(table(listed, title))
    agreement = facts["agreement"]
    console.print(
        f"{'' if agreement is None else f'agreement where the base is sure {agreement:.0%}; '}streaming read "
        f"{max(facts['read_bandwidths']) / 1e9:.1f} GB/s; weights read per pass: base "
        f"{facts['pass_bytes']['base'] / 1e6:.1f} MB, guide {facts['pass_bytes']['guide'] / 1e6:.1f} MB; "
        f"load average {min(facts['load_averages']):.1f}-{max(facts['load_averages']):.1f}",
        soft_wrap=True,
        highlight=False,
    )
    for name, found in facts["rivals"].items():
        console.print(
            f"{name} has the same likeliest token at {found['argmax']:.1%} of the positions; probabilities "
            f"differ by up to {found['probability']:.1e}",
            soft_wrap=True,
            highlight=False,
        )
    for name, reason in facts["left_out"].items():
        console.print(f"{name} was not run: {reason}", soft_wrap=True, highlight=False, markup=False)
