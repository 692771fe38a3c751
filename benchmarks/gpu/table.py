"""The figures of a run as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.goals import Goal, table


def markdown(done: Mapping[str, Any], goals: Sequence[Goal] = ()) -> str:
    """What is wanted and whether it was reached; then one row for each figure, its bound beside it, and one
    for each part that has none.
    """
    lines = [*table(goals, done), ""] if goals else []
    lines += ["| part | figure | measured | quartiles | bound | of it |", "|---|---|--:|--:|--:|--:|"]
    for name, part in done.items():
        if part["state"] != "measured":
            reason = part["error"].strip().splitlines()[-1].replace("|", "/")
            lines.append(f"| {name} | {part['state']}: {reason} | | | | |")
        lines += [row(name, figure) for figure in part["figures"]]
    return "\n".join(lines) + "\n"


def row(part: str, figure: Mapping[str, Any]) -> str:
    unit, share = figure["unit"], figure["share"]
    quartiles = ""
    if figure["lower"] is not None and figure["upper"] is not None:
        quartiles = f"{number(figure['lower'], unit)} to {number(figure['upper'], unit)}"
    bound = "" if figure["bound"] is None else number(figure["bound"], unit)
    cells = [part, figure["what"], number(figure["value"], unit), quartiles, bound]
    return f"| {' | '.join([*cells, '' if share is None else f'{share:.0%}'])} |"


def number(value: float, unit: str) -> str:
    """Three significant digits, in a unit that suits."""
    if unit == "B/s":
        return f"{value / 1e9:.4g} GB/s"
    return f"{value:.3g} {unit}".rstrip()
