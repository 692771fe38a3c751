"""compute-sanitizer over a few small cases of every kernel: `python -m benchmarks.gpu.sanitize OUT`.

Writes OUT/sanitizer.json: for each tool the errors that it counted, or why it counted none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck")
# One case of every kernel in bf16: the tools make a kernel many times slower.
CASES = (
    "agrees and bfloat16 and (linear-7x33x5 or linear-partitions or rms_norm-7x33 or layer_norm-7x33 or "
    "rope-llama or gated_act-silu-7x33 or kv_append-few or paged_attention-mixed or gated_linear-silu or "
    "linear_add-bias or linear_rope_append-llama)"
)
TESTS = (
    "-m",
    "pytest",
    "-q",
    "-m",
    "gpu",
    "-p",
    "no:cacheprovider",
    "tests/kernels/test_triton.py",
    "-k",
    CASES,
)
SUMMARY = re.compile(
    r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?)"
)


def errors_of(output: str) -> int | None:
    """How many errors a tool's output counts; None where it does not say."""
    found = SUMMARY.search(output)
    return None if found is None else int(found[1] or found[2])


def start(tool: str, log: IO[str], command: Sequence[str]) -> subprocess.Popen[str]:
    # A group of its own: the tool starts the program as its child.
    return subprocess.Popen(
        [SANITIZER, "--tool", tool, *command],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_tools(
    seconds: float, command: Sequence[str] = (sys.executable, *TESTS)
) -> dict[str, dict[str, int | str | None]]:
    """All tools at once; those that are not done in time are stopped."""
    if shutil.which(SANITIZER) is None:
        return {tool: {"errors": None, "why": f"{SANITIZER} is not on PATH"} for tool in TOOLS}
    found: dict[str, dict[str, int | str | None]] = {}
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        logs = {tool: stack.enter_context(tempfile.TemporaryFile("w+")) for tool in TOOLS}
        for tool, process in {tool: start(tool, log, command) for tool, log in logs.items()}.items():
            why = ""
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                why = f"stopped after {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            logs[tool].seek(0)
            output = logs[tool].read()
            found[tool] = {"errors": errors_of(output), "why": why, "status": process.returncode}
            found[tool]["output"] = output[-4000:]
    return found


def main(out: Path, seconds: float = 60) -> bool:
    """Whether no tool found an error; one that is not there or not done found none."""
    found = run_tools(seconds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sanitizer.json").write_text(json.dumps(found, indent=1) + "\n")
    for tool, one in found.items():
        print(f"{tool}: {one['errors']} errors {one['why']}")
    return not any(one["errors"] for one in found.values())


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
