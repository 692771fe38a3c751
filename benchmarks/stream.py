"""What `nudging generate` costs for many prompts: 3000 of 8 tokens against ten runs of 300, by the pocket
pair.

All in processor time, which other work on the machine changes little, beyond what a run of one prompt takes:
the best of a few runs each.  Linux only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click

COMMAND = [sys.executable, "-m", "nudging", "generate", "--base", "pocket:base", "--guide", "pocket:guide"]
FLAGS = ["--threads", "1", "--ignore-eos", "--no-progress", "--input", "-"]
PROMPT_LENGTH = 8


class Run(NamedTuple):
    """Seconds of processor time until the first line was there and until the end."""

    first: float
    whole: float


def prompts(number: int) -> bytes:
    """No two alike, so that nobody finds what another one has computed."""
    ids = ([40 + i % 60, 40 + i // 60, *range(42, 40 + PROMPT_LENGTH)] for i in range(number))
    return b"".join(json.dumps({"prompt_token_ids": one}).encode() + b"\n" for one in ids)


def measure(number: int, max_tokens: int) -> Run:
    """One process for so many prompts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(os.memfd_create("prompts"), "w+b") as source:
        source.write(prompts(number))
        source.seek(0)
        command = [*COMMAND, *FLAGS, "--max-tokens", str(max_tokens)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, env=one_thread)
        assert process.stdout is not None
        lines = iter(process.stdout.readline, b"")
        next(lines)
        first = processor_time(process.pid)
        count = 1 + sum(1 for _ in lines)
        assert (process.wait(), count) == (0, number), f"{count} of {number} lines came"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(first, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def processor_time(pid: int) -> float:
    """The seconds that a running process has had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--number", default=3000, help="Prompts of the long run.")
@click.option("--part", default=300, help="Prompts of the short one.")
@click.option("--max-tokens", default=8, help="Tokens written for each.")
@click.option("--rounds", default=3, help="Runs of each; the best one counts.")
def main(number: int, part: int, max_tokens: int, rounds: int) -> None:
    """Processor time of `nudging generate` for many prompts against that for few."""
    runs = [[measure(count, max_tokens) for count in (1, part, number)] for _ in range(rounds)]
    start, few, many = (min(run, key=lambda one: one.whole) for run in zip(*runs, strict=True))
    beyond_few, beyond_many = few.whole - start.whole, many.whole - start.whole
    click.echo(f"a run of one prompt: {start.whole:.2f} s of processor time")
    for count, beyond in ((part, beyond_few), (number, beyond_many)):
        click.echo(f"{count} prompts: {beyond:.2f} s beyond it, {1e3 * beyond / count:.2f} ms each")
    parts = number / part
    click.echo(f"{number} cost {beyond_many / beyond_few / parts:.2f} times what {parts:g} runs of {part} do")
    share = (many.first - start.first) / beyond_many
    click.echo(f"the first line is there after {share:.1%} of the time beyond the start")


if __name__ == "__main__":
    main()
