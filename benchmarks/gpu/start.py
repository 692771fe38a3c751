"""How long it takes until there is a token, and until what may come next is recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.pairs import POLICY, TOKEN, Pair
from benchmarks.gpu.parts import Figure, Found
from benchmarks.pair import pass_bytes, pocket_prompts
from benchmarks.report import quartiles
from nudging import Base, SamplingParams
from nudging.core.executor import record_ahead

ROOT = Path(__file__).parents[2]


def start_up(pair: Pair) -> Found:
    """From nothing to the first token within this process."""
    began = time.perf_counter()
    loaded = pair.models
    made = time.perf_counter()
    prompts = pocket_prompts(pair.llm, 1)[0]
    opened = time.perf_counter()
    pair.llm.generate(dict(prompts), SamplingParams(max_tokens=1), POLICY)
    first = time.perf_counter()
    sizes = {role: pass_bytes(pair.llm, role) for role in ("base", "guide")}
    return Found(
        [
            Figure("weights made on the device", made - began, "s"),
            Figure("engine opened", opened - made, "s"),
            Figure("first token", first - opened, "s"),
        ],
        {"pass_bytes": sizes, "parameters": [model.decoder.num_parameters for model in loaded]},
    )


def process_start(pair: Pair) -> Found:
    """From the start of a process to its first token, the files being in the page cache."""
    began = time.perf_counter()
    paths = pair.checkpoints()
    written = time.perf_counter() - began
    command = [sys.executable, "-m", "benchmarks.gpu.first_token", *map(str, paths)]
    command += [str(pair.device), pair.scale.kv_cache, str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    return Found([Figure(what, s, "s") for what, s in {"files written": written, **seconds}.items()])


def ahead(pair: Pair) -> Found:
    """How long recordings take that are made while there is nothing to do, which a request may have to wait
    for, and the memory that they take.
    """
    seconds: list[float] = []
    with pair.open() as llm:
        prompts = dict(pocket_prompts(llm, 1)[0])
        params = SamplingParams(max_tokens=pair.scale.tokens, ignore_eos=True)
        for policy, speculate in ((Base(), "off"), (POLICY, "auto"), (TOKEN, pair.scale.drafts[-1])):
            for _ in range(2):
                llm.generate(prompts, params, policy, speculate)
        runners, before = llm._engine.runners.values(), free_memory(pair.device)
        until = time.perf_counter() + pair.scale.ahead
        while time.perf_counter() < until:
            began = time.perf_counter()
            if not llm._thread.call(lambda: record_ahead(runners)):
                break
            seconds.append(time.perf_counter() - began)
        taken = before - free_memory(pair.device)
    lower, median, upper = quartiles(seconds)
    return Found(
        [
            Figure("one recording ahead", median, "s", None, lower, upper),
            Figure("the longest of them", max(seconds), "s"),
            Figure("recordings made", len(seconds), ""),
            Figure("memory of one", taken / len(seconds) / 2**20, "MiB"),
        ]
    )


def free_memory(device: torch.device) -> int:
    """Bytes of the device's memory that nobody has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
