"""How long launches take on a device, recorded and not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import quartiles
from nudging.executor.cuda_graphs import CudaRecorder, Recorder
from nudging.executor.graph_runner import GraphRunner
from nudging.models.decoder import Decoder

# Lower quartile, median and upper quartile of seconds.
Spread = tuple[float, float, float]


class Again:
    """What stands in for a recorder on a CPU: a replay runs it again."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def has_room(self) -> bool:
        return True


def rehearsed_runner(
    decoder: Decoder,
    num_blocks: int,
    block_size: int,
    prefix_caching: bool,
    team: Any,
    flash: Any,
) -> GraphRunner:
    """On a CPU, the runner that a GPU has."""
    return GraphRunner(decoder, num_blocks, block_size, Again(), prefix_caching, flash)


def recorder_of(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else Again()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_on_device(run: Callable[[], object], device: torch.device, repeats: int) -> Spread:
    """The device's seconds for one `run`, by its own clock; one more run warms up."""
    if device.type != "cuda":
        return time_on_host(run, device, repeats)
    run()
    wait(device)
    seconds = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return quartiles(seconds)


def time_on_host(run: Callable[[], object], device: torch.device, repeats: int) -> Spread:
    """The seconds from the call of `run` until the device is done; one more run warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return quartiles(seconds)


def time_recorded(run: Callable[[], object], device: torch.device, repeats: int, parts: int = 1) -> Spread:
    """The device's seconds for one of the `parts` equal parts of `run`, which is recorded and replayed."""
    replay = recorder_of(device).record(run)
    lower, median, upper = time_on_device(replay, device, repeats)
    return lower / parts, median / parts, upper / parts
