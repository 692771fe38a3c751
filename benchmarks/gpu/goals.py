"""What is wanted of a run, beside what it found: the first table of gpu.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.scale import Scale

# What a run's file holds, by part.
Done = Mapping[str, Any]
# The number that was found and whose it is; None where it was not measured.
Reading = tuple[float, str] | None
SPECULATIVE = ("speculative", "adaptive")
# Names that parts and figures have.
LOOP, LESS_AGREEMENT = "two transformers models", "agreement of .8"
OVER_BOTH = "adaptive over max(lazy, .97 base alone)"


@dataclass(frozen=True)
class Goal:
    """A figure that is to be at least `wanted`, or at most where `is_most`; a share where `unit` is "%"."""

    what: str
    wanted: float
    unit: str
    read: Callable[[Done], Reading]
    is_most: bool = False

    def row(self, done: Done) -> str:
        found, sign = self.read(done), "at most" if self.is_most else "at least"
        cells = [self.what, f"{sign} {self.number(self.wanted)}"]
        if found is None:
            return f"| {' | '.join([*cells, 'not measured', '', ''])} |"
        value, source = found
        reached = value <= self.wanted if self.is_most else value >= self.wanted
        return f"| {' | '.join([*cells, self.number(value), 'yes' if reached else 'no', source])} |"

    def number(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.3g} {self.unit}"


def table(goals: Sequence[Goal], done: Done) -> list[str]:
    """The lines of the table."""
    return ["| goal | wanted | measured | reached | by |", "|---|--:|--:|---|---|"] + [
        goal.row(done) for goal in goals
    ]


def goals_of(scale: Scale) -> list[Goal]:
    """All of them, for each pair."""
    listed, context = [], scale.contexts[0]
    one_row = f"pass recorded: 1 texts of {context}, 1 rows each"
    many = f"{scale.batches[0]} to {scale.batches[-1]} at once"
    changes = "step in which authors change, token-level text by cycles"
    for name in scale.pairs:
        base, guide = (f"{name}, passes of the {role}" for role in ("base", "guide"))
        text, cycles, loop = (f"{name}, {part}" for part in (f"context of {context}", "cycles", LOOP))
        listed += [
            Goal("a pass of the base, of weights + KV over copying", 0.85, "%", of_copy(base, one_row)),
            Goal("base alone, a text, of weights + KV over copying", 0.85, "%", of_copy(text, "base alone")),
            Goal("a pass of the guide, of weights + KV over copying", 0.70, "%", of_copy(guide, one_row)),
            Goal("nudged over base alone, as the pair agrees", 1.6, "x", best(f"{name}, questions")),
            Goal("nudged over base alone, agreement .8", 1.9, "x", best(f"{name}, {LESS_AGREEMENT}")),
            Goal("nudged over a loop of two models", 4.0, "x", value(loop, "ours over it")),
            Goal(f"{many}, {OVER_BOTH}", 1.0, "x", lowest(f"{name}, ", " at once", OVER_BOTH)),
            Goal("a step in which authors change", 0.0, "us longer", value(cycles, changes), True),
            Goal("device idle between cycles", 0.02, "%", value(cycles, "device idle between cycles"), True),
        ]
    start = f"{next(iter(scale.pairs))}, process start"
    listed.append(Goal("process start to first token", 30.0, "s", value(start, "first token"), True))
    for role in ("base", "guide"):
        read = value(f"{role}'s products", "ours over torch's, a layer's products")
        listed.append(Goal(f"row invariance, the {role}'s products", 1.05, "x", read, True))
    return listed


def figures(done: Done, part: str, what: str) -> list[Mapping[str, Any]]:
    """A part's figures whose names begin so."""
    return [f for f in done.get(part, {}).get("figures", []) if f["what"].startswith(what)]


def value(part: str, what: str) -> Callable[[Done], Reading]:
    """The largest of a part's figures that begin so."""

    def read(done: Done) -> Reading:
        found = figures(done, part, what)
        return max(((f["value"], f"{part}: {f['what']}") for f in found), default=None)

    return read


def lowest(prefix: str, suffix: str, what: str) -> Callable[[Done], Reading]:
    """The least of those figures in all parts of such names."""

    def read(done: Done) -> Reading:
        parts = [part for part in done if part.startswith(prefix) and part.endswith(suffix)]
        found = [f for part in parts for f in figures(done, part, what)]
        return min(((f["value"], f["what"]) for f in found), default=None)

    return read


def of_copy(part: str, what: str) -> Callable[[Done], Reading]:
    """The share of the bound, which is by the larger of what is read and what is copied, by copying alone."""

    def read(done: Done) -> Reading:
        found, rates = figures(done, part, what), [f["value"] for f in figures(done, "memory", "")]
        if not found or not rates:
            return None
        copied = figures(done, "memory", "copied")[0]["value"]
        return found[0]["share"] * max(rates) / copied, f"{part}: {found[0]['what']}"

    return read


def best(part: str) -> Callable[[Done], Reading]:
    """The fastest speculative arm, times as fast as the base alone."""

    def read(done: Done) -> Reading:
        arms = done.get(part, {}).get("details", {}).get("arms", [])
        found = [
            (arm["relative"], f"{part}: {arm['name']}") for arm in arms if arm["name"].startswith(SPECULATIVE)
        ]
        return max(found, default=None)

    return read
