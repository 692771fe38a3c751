"""`nudging bench`: the benchmarks of a source checkout, which the installed package does not carry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

# Where engine/ lies in a checkout: two folders up from this file.
ROOT = Path(__file__).resolve().parents[1]
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@click.group()
def bench() -> None:
    """Measure speed, side by side, with all arms held to one text."""


@bench.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def pair(arguments: tuple[str, ...]) -> None:
    """Base alone, guide alone, eager, lazy and speculative nudging, and rivals; `--help` shows the flags."""
    if not (ROOT / "benchmarks" / "pair.py").is_file():
        raise click.ClickException(
            "the benchmarks are in the source checkout only; clone it and run this there"
        )
    done = subprocess.run([sys.executable, "-m", "benchmarks.pair", *arguments], cwd=ROOT, check=False)
    sys.exit(done.returncode)
