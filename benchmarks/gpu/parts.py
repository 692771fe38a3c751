"""A measurement in parts, each guarded: what fails or would take too long is written down, and the next runs.

After every part all that is known is on disk, so that a run that is stopped has lost nothing.  An error of
the device that no call in its process survives makes the rest run in a new process, which goes on behind it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.goals import Goal
from benchmarks.gpu.table import markdown


@dataclass(frozen=True)
class Figure:
    """One measured number beside its bound, both in `unit`; a bound of None: there is none.

    `lower`, `upper`: quartiles, where it was measured more than once.
    """

    what: str
    value: float
    unit: str
    bound: float | None = None
    lower: float | None = None
    upper: float | None = None

    @property
    def share(self) -> float | None:
        """How much of what is possible was reached: a time above its bound as well as a speed below it."""
        if not self.bound or not self.value:
            return None
        return self.bound / self.value if self.unit in ("s", "us") else self.value / self.bound


@dataclass
class Found:
    """What a part found: figures for the table, and anything else for the file."""

    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


class Missing(Exception):
    """What a part measures is not there; its message says what is to be done."""


@dataclass(frozen=True)
class Part:
    """`run` takes about `seconds` at most; it is not started where fewer are left."""

    name: str
    seconds: float
    run: Callable[[], Found]


def run_parts(
    parts: Sequence[Part],
    path: Path,
    deadline: float,
    is_well: Callable[[], bool],
    say: Callable[[str], None] = print,
    goals: Sequence[Goal] = (),
    clock: Callable[[], float] = time.time,
) -> bool:
    """Run all parts that are not in the file `path` yet, until `deadline` of the clock; whether none failed.
    `goals`: what the table begins with.

    Where `is_well` says that the device is lost, the process starts itself anew for the parts that are left.
    """
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        if part.name in done:
            continue
        done[part.name] = run_part(part, deadline - clock())
        write(done, path, goals)
        say(f"{part.name}: {done[part.name]['state']} in {done[part.name]['seconds']:.1f} s")
        if done[part.name]["state"] == "failed":
            say(done[part.name]["error"])
            if not is_well():
                say("the device is lost to this process: going on in a new one")
                sys.stdout.flush()
                os.execv(sys.executable, again(deadline))
    return all(one["state"] != "failed" for one in done.values())


def again(deadline: float) -> list[str]:
    """The command that goes on with this run."""
    return [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--resume", "--until", str(deadline)]


def run_part(part: Part, left: float) -> dict[str, Any]:
    """The part's entry in the file: `state` is measured, missing, failed or skipped."""
    if left < part.seconds:
        reason = f"it takes about {part.seconds:.0f} s and {max(left, 0):.0f} s are left"
        return {"state": "skipped", "seconds": 0.0, "error": reason, "figures": [], "details": {}}
    began = time.perf_counter()
    state, error, found = "measured", None, Found()
    try:
        found = part.run()
    except Missing as absent:
        state, error = "missing", str(absent)
    except Exception:  # whatever it is, it must not cost the other parts
        state, error = "failed", traceback.format_exc()
    seconds = time.perf_counter() - began
    figures = [asdict(figure) | {"share": figure.share} for figure in found.figures]
    return {
        "state": state,
        "seconds": seconds,
        "error": error,
        "figures": figures,
        "details": found.details,
    }


def write(done: dict[str, Any], path: Path, goals: Sequence[Goal] = ()) -> None:
    """The file and, beside it, the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(done, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(done, goals))


def device_is_well(device: torch.device) -> bool:
    """Whether this process can still compute on the device."""
    try:
        return bool(torch.ones(2, device=device).sum().item() == 2)
    except RuntimeError:
        return False
