"""How near `linear` comes to the memory: GB/s of weights by shape, dtype and rows, beside torch and a read.

    python benchmarks/cpu_linear.py --threads 2
    python benchmarks/cpu_linear.py --threads 1 --cpu-time      # on a machine that has other work

Every sample reads a working set larger than the caches, once; ours, torch's and the plain read (the sum of an
integer tensor, which no unit but the memory bounds) alternate.  The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bandwidth import plain_memory
from torch import Tensor

from nudging import _C
from nudging.kernels.cpu import BEST
from nudging.kernels.linear import linear
from nudging.kernels.weight import PackedWeight
from nudging.models.weights import Arena, aligned

SHAPES = [(4096, 4096), (2048, 768), (768, 2048), (32000, 768), (2048, 8192), (8192, 2048)]  # out, in
ROWS = (1, 2, 4, 8, 16)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def sample(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that one `run` takes."""
    begin = clock()
    run()
    return clock() - begin


def measure(
    weights: list[Tensor], rows: int, repeats: int, clock: Callable[[], float], plain: Tensor
) -> dict[str, float]:
    """Median GB/s of ours, torch's and the plain read over `weights` (all of one shape), alternating."""
    x = torch.randn(rows, weights[0].shape[1]).to(weights[0].dtype)
    # What torch multiplies by packed weights is no product, and takes as long.
    packed = [PackedWeight(weight, len(weight)) for weight in weights]
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: [linear(x, weight) for weight in packed],
        "torch": lambda: [F.linear(x, weight) for weight in weights],
        "read": plain.sum,
    }
    num_bytes = dict.fromkeys(arms, sum(w.nbytes for w in weights)) | {"read": plain.nbytes}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in arms.values():
        sample(run, clock)  # warm-up
    for turn in range(repeats):
        for name in random.Random(turn).sample(list(arms), len(arms)):
            seconds[name].append(sample(arms[name], clock))
    return {name: num_bytes[name] / statistics.median(times) / 1e9 for name, times in seconds.items()}


def main() -> None:
    """Print a line for each shape, dtype and number of rows, then the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--mib", type=int, default=192, help="working set; several times the last cache")
    parser.add_argument("--cpu-time", action="store_true", help="count the thread's own time (1 thread only)")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts one thread's time; it needs --threads 1")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    size = options.mib << 20
    plain = plain_memory(size, torch.int64, torch.device("cpu"))
    results = []
    print(f"{'weight':>12} {'dtype':>5} {'rows':>4} {'ours':>7} {'torch':>7} {'read':>7} GB/s   ours/read")
    for dtype in options.dtype:
        for out, features in SHAPES:
            element = DTYPES[dtype].itemsize
            count = max(1, size // (out * features * element))
            arena = Arena(count * aligned(out * features * element), torch.device("cpu"))
            weights = [arena.empty((out, features), DTYPES[dtype]).normal_() for _ in range(count)]
            assert out % _C.PANEL == 0, "they are whole panels"
            for rows in options.rows:
                speed = measure(weights, rows, options.repeats, clock, plain)
                share = speed["ours"] / speed["read"]
                results.append({"shape": [out, features], "dtype": dtype, "rows": rows, **speed})
                print(
                    f"{out:>6}x{features:<5} {dtype:>5} {rows:>4} {speed['ours']:7.1f} {speed['torch']:7.1f} "
                    f"{speed['read']:7.1f}        {share:9.2f}",
                    flush=True,
                )
    told = {
        "threads": options.threads,
        "isa": BEST.name,
        "cpu_time": options.cpu_time,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "results": results,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
