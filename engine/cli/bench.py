"""`nudging bench`: the benchmarks of a source checkout, which the installed package does not carry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

# Where engine/ lies in a checkout: two folders up from this file.
ROOT = Path(__file__).resolve().parents[2]
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@click.group()
def bench() -> None:
    """Measure speed, side by side, with all arms held to one text."""


@bench.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def pair(arguments: tuple[str, ...]) -> None:
    """Base alone, guide alone, eager, lazy and speculative nudging, and rivals; `--help` shows the flags."""
    run("benchmarks.pair", arguments)


@bench.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def batch(arguments: tuple[str, ...]) -> None:
    """Tokens per second against the number of requests that run at once; `--help` shows the flags."""
    run("benchmarks.batch", arguments)


@bench.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def host(arguments: tuple[str, ...]) -> None:
    """What a step costs outside the models' passes; `--help` shows the flags."""
    run("benchmarks.host_cost", arguments)


@bench.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def stream(arguments: tuple[str, ...]) -> None:
    """Processor time of `nudging generate` for thousands of prompts; `--help` shows the flags."""
    run("benchmarks.stream", arguments)


def run(module: str, arguments: tuple[str, ...]) -> None:
    """Run a benchmark of the checkout and exit as it does."""
    if not (ROOT / "benchmarks" / "pair.py").is_file():
        raise click.ClickException(
            "the benchmarks are in the source checkout only; clone it and run this there"
        )
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False)
    sys.exit(done.returncode)
