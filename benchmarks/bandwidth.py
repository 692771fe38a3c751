"""How fast this device reads memory: the limit of small batches, measured in the run that is judged by it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from nudging.models.weights import Arena

REPEATS = 3


def plain_memory(num_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ones where weights would lie: on a CPU on large pages, which are read faster."""
    return Arena(num_bytes, device).empty((num_bytes // dtype.itemsize,), dtype).fill_(1)


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 28) -> float:
    """Bytes per second at which the sum of a tensor of `num_bytes` reads it; the best of some repeats.

    Choose more bytes than the caches hold, or it is their speed.  Uses torch's own number of threads.
    """
    data = plain_memory(num_bytes, torch.float32, device)
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one also warms up
        began = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best
