"""One arm of another engine in a process of its own: `python -m benchmarks.gpu.other_engine FOLDER`.

Such an engine starts processes, keeps memory of the device and may end its own process where one of them
fails: none of that shall cost the other parts.  What to run is in FOLDER/job.json, what it wrote then in
FOLDER/said.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms.arm import Limits, Prompts, Rival, Sample, Setting
from benchmarks.rivals import ENGINES

ROOT = Path(__file__).parents[2]


def run_elsewhere(
    engine: str,
    arm: str,
    setting: Setting,
    prompts: list[Prompts],
    limits: Limits,
    rounds: int,
    seconds: float,
) -> list[list[Sample]]:
    """What the arm wrote, a sample for each prompt, for each round after one that does not count.

    Raises TimeoutError after `seconds`, RuntimeError with what it printed where it failed.
    """
    job = {
        "engine": engine,
        "arm": arm,
        "base": str(setting.base),
        "guide": str(setting.guide),
        "device": str(setting.device),
        "threads": setting.threads,
        "prompts": prompts,
        "max_tokens": limits.max_tokens,
        "ignore_eos": limits.ignore_eos,
        "rounds": rounds,
    }
    setting.folder.mkdir(parents=True, exist_ok=True)
    (setting.folder / "job.json").write_text(json.dumps(job))
    log = setting.folder / "log.txt"
    command = [sys.executable, "-m", "benchmarks.gpu.other_engine", str(setting.folder)]
    with log.open("w") as file:
        # A group of its own: what it starts is ended with it.
        started = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            status = started.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{arm} took more than {seconds:.0f} s; {log.read_text()[-2000:]}") from None
        finally:
            end_group(started)
    if status:
        raise RuntimeError(f"{arm} ended with {status}: {log.read_text()[-4000:]}")
    said = json.loads((setting.folder / "said.json").read_text())
    return [[Sample(tuple(one["token_ids"]), one["seconds"]) for one in samples] for samples in said]


def end_group(started: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of all that it started."""
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        started.wait()


def write(arm: Rival, job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """All rounds of the job but the first."""
    limits = Limits(job["max_tokens"], job["ignore_eos"])
    rounds = [[arm.run(prompt, limits) for prompt in job["prompts"]] for _ in range(job["rounds"] + 1)]
    return [[{"token_ids": s.token_ids, "seconds": s.seconds} for s in samples] for samples in rounds[1:]]


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    paths = Path(job["base"]), Path(job["guide"])
    setting = Setting(*paths, torch.device(job["device"]), job["threads"], folder)
    (arm,) = ENGINES[job["engine"]].arms(setting, lambda name: name == job["arm"])
    (folder / "said.json").write_text(json.dumps(write(arm, job)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
