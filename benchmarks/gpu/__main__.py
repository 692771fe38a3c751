"""All that a GPU is measured by, in one run: `python -m benchmarks.gpu`, or all of it, tests too: `make gpu`.

    python -m benchmarks.gpu --device cpu --tiny    # a rehearsal without a GPU: the program, not the figures

Writes gpu.json and gpu.md: every figure with its bound beside it, which is the bandwidth that was measured in
the same run over the bytes that must be read.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.gpu.ceilings import attention, bandwidths, heads, node_gap, products
from benchmarks.gpu.cycles import cycles
from benchmarks.gpu.goals import LESS_AGREEMENT, LOOP, goals_of
from benchmarks.gpu.pairs import Pair
from benchmarks.gpu.parts import Figure, Found, Missing, Part, device_is_well, run_parts
from benchmarks.gpu.passes import passes, profiled
from benchmarks.gpu.rivals import base_alone, missing, of_files, setting_of, two_models
from benchmarks.gpu.scale import FULL, TINY, Scale
from benchmarks.gpu.start import ahead, process_start, start_up
from benchmarks.gpu.tiles import tiles
from benchmarks.inflate import Layout
from benchmarks.pair import RESULTS, device_name
from benchmarks.rivals import ENGINES
from nudging import LoadedModel

CLOCKS = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
)
# Arms of engines that read files; to start one takes minutes.
OTHERS = (("vllm", "vllm bf16"), ("vllm", "vllm bf16 drafted"), ("sglang", "sglang bf16"))
OTHER_SECONDS = 240.0


class Run:
    """One run: its device, its scale, and the bandwidth that it found."""

    def __init__(self, device: torch.device, scale: Scale, out: Path, folder: Path) -> None:
        self.device, self.scale, self.out = device, scale, out
        self.pairs = {
            name: Pair(shapes, device, scale, folder / str(index))
            for index, (name, shapes) in enumerate(scale.pairs.items())
        }
        self._bandwidth: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the device reads: the larger of what reading and copying reach."""
        if self._bandwidth is None:
            self._bandwidth = max(bandwidths(self.device, self.scale))
        return self._bandwidth

    def parts(self) -> list[Part]:
        """Everything, what is wanted most first: see `goals`."""
        listed = [
            Part("device", 0, self.facts),
            Part("tests", 0, self.tests),
            Part("memory", 5, self.memory),
            Part("gap between kernels", 5, lambda: node_gap(self.device, self.scale)),
        ]
        (name, pair), *others = self.pairs.items()
        products, ops = self.of_ops()
        listed += [*self.wanted_most(name, pair), *products]
        listed.append(Part(f"{name}, process start", 90, partial(process_start, pair)))
        for other in others:
            listed += self.wanted_most(*other)
        listed += ops
        for both in self.pairs.items():
            listed += self.rest(*both)
        listed.append(Part(f"{name}, passes of the base in int8", 60, partial(self.int8, pair)))
        listed.append(Part(f"{name}, transformers, static cache", 90, partial(self.rival, pair, "static")))
        return listed + [self.of_files(name, pair, *both) for both in OTHERS]

    def of_files(self, name: str, pair: Pair, engine: str, arm: str) -> Part:
        """Another engine that reads checkpoints, or what it lacks."""
        obstacle = ENGINES[engine].obstacle(setting_of(pair, pair.folder, pair.folder))
        if obstacle is not None:
            return Part(f"{name}, {arm}", 0, partial(missing, obstacle))
        run = partial(of_files, pair, engine=engine, arm=arm, seconds=OTHER_SECONDS)
        return Part(f"{name}, {arm}", OTHER_SECONDS, lambda: run(self.bandwidth))

    def wanted_most(self, name: str, pair: Pair) -> list[Part]:
        """What the goals of a pair are read from."""
        context = self.scale.contexts[0]
        listed = [Part(f"{name}, start-up", 20, partial(start_up, pair))]
        for index, role in enumerate(("base", "guide")):
            listed.append(Part(f"{name}, passes of the {role}", 15, partial(self.passes, pair, index)))
        listed.append(Part(f"{name}, questions", 30, partial(self.arms, pair, None)))
        listed.append(Part(f"{name}, {LESS_AGREEMENT}", 45, partial(self.less_agreement, pair)))
        listed.append(Part(f"{name}, context of {context}", 30, partial(self.arms, pair, context)))
        listed.append(Part(f"{name}, cycles", 45, partial(self.cycles, pair)))
        for size in self.scale.batches:
            listed.append(Part(f"{name}, {size} at once", 10, partial(self.batch, pair, size)))
        listed.append(Part(f"{name}, {LOOP}", 20, partial(self.loop, pair)))
        return listed

    def rest(self, name: str, pair: Pair) -> list[Part]:
        listed = [
            Part(f"{name}, recordings ahead", 20, partial(ahead, pair)),
            Part(f"{name}, time in passes", 10, pair.idle),
        ]
        for index, role in enumerate(("base", "guide")):
            listed.append(Part(f"{name}, kernels of the {role}", 10, partial(self.kernels, pair, index)))
        listed.append(Part(f"{name}, transformers", 20, partial(self.rival, pair, None)))
        for context in self.scale.contexts[1:]:
            listed.append(Part(f"{name}, context of {context}", 40, partial(self.arms, pair, context)))
        return listed

    def of_ops(self) -> tuple[list[Part], list[Part]]:
        """The ops of a pass, by model of the first pair: products with weights, and the others."""
        args = self.device, self.scale
        base, guide = (Layout.of(shape) for shape in next(iter(self.scale.pairs.values())))

        def part(name: str, run: Any, layout: Layout) -> Part:
            return Part(name, 10, partial(self.op, run, *args, layout))

        first = [part("base's products", products, base), part("guide's products", products, guide)]
        return first, [
            part("base's head", heads, base),
            part("guide's head", heads, guide),
            part("base's attention", attention, base),
            Part("tiles of the base's products", 90, partial(self.op, tiles, *args, base)),
            Part("tiles of the guide's products", 60, partial(self.op, tiles, *args, guide)),
            Part("rounding", 20, self.rounding),
        ]

    def op(self, run: Any, *args: Any) -> Found:
        with torch.inference_mode():
            found: Found = run(*args, self.bandwidth)
        return found

    def rounding(self) -> Found:
        """Whether the instruction for large tiles gives our bits."""
        if self.device.type != "cuda":
            raise Missing("a GPU: its two matrix instructions are compared")
        from benchmarks.gpu.rounding import same_bits

        return Found(
            [
                Figure(f"results of large tiles with our bits, {features} inputs, {dtype}", share, "")
                for features in (64, 4096)
                for dtype, share in same_bits(self.device, features).items()
            ]
        )

    def passes(self, pair: Pair, index: int) -> Found:
        return passes(pair.models[index].decoder, self.scale, self.bandwidth)

    def int8(self, pair: Pair) -> Found:
        """The base's passes where its weights are int8, which is another precision."""
        device = str(self.device)
        model = LoadedModel.load(pair.checkpoints()[0], device=device, quantization="int8")
        return passes(model.decoder, self.scale, self.bandwidth)

    def cycles(self, pair: Pair) -> Found:
        return cycles(pair, self.bandwidth)

    def kernels(self, pair: Pair, index: int) -> Found:
        return profiled(pair.models[index].decoder, self.scale)

    def arms(self, pair: Pair, context: int | None) -> Found:
        return pair.arms(context, self.bandwidth)

    def less_agreement(self, pair: Pair) -> Found:
        return pair.less_agreement(0.8, self.bandwidth)

    def batch(self, pair: Pair, size: int) -> Found:
        return pair.batch(size, self.bandwidth)

    def rival(self, pair: Pair, cache: str | None) -> Found:
        return base_alone(pair, self.bandwidth, cache)

    def loop(self, pair: Pair) -> Found:
        return two_models(pair, self.bandwidth)

    def facts(self) -> Found:
        """What the device is; its clocks are read and left as they are."""
        import triton

        details: dict[str, Any] = {
            "device": device_name(str(self.device)),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
        if self.device.type == "cuda":
            found = torch.cuda.get_device_properties(self.device)
            details |= {
                "capability": f"{found.major}.{found.minor}",
                "multiprocessors": found.multi_processor_count,
                "memory": found.total_memory,
                "l2": getattr(found, "L2_cache_size", None),
                "clocks": clocks(),
            }
        return Found(details=details)

    def tests(self) -> Found:
        """What the tests and the sanitizer that ran before this found."""
        found = Found()
        junit = self.out / "gpu_tests.xml"
        if junit.exists():
            suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
            counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            found.details["tests"] = counts
            found.figures += [Figure(f"tests: {key}", value, "") for key, value in counts.items()]
        sanitizer = self.out / "sanitizer.json"
        if sanitizer.exists():
            found.details["sanitizer"] = json.loads(sanitizer.read_text())
            for tool, one in found.details["sanitizer"].items():
                if one["errors"] is not None:
                    found.figures.append(Figure(f"sanitizer: {tool}", one["errors"], "errors"))
        return found

    def memory(self) -> Found:
        read, copied = bandwidths(self.device, self.scale)
        self._bandwidth = max(read, copied)
        return Found([Figure("read", read, "B/s"), Figure("copied, read and written", copied, "B/s")])


def clocks() -> dict[str, str]:
    """The driver and the clocks as they are now; why they are not known, where nvidia-smi does not say."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(CLOCKS.split(","), values, strict=False))


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda")
@click.option("--tiny", is_flag=True, help="Tiny models: the program is tried, nothing is measured.")
@click.option("--seconds", default=420.0, help="For everything; what would take longer is left out.")
@click.option("--until", type=float, help="Instead of --seconds: the time of the clock, in seconds of Unix.")
@click.option("--resume", is_flag=True, help="Keep the parts that are in gpu.json and run the others.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, help="A folder for gpu.json, gpu.md."
)
def main(device: str, tiny: bool, seconds: float, until: float | None, resume: bool, out: Path) -> None:
    """Measure a GPU: its ceilings, the ops, passes, pairs of models, and rivals."""
    path = out / "gpu.json"
    if not resume:
        path.unlink(missing_ok=True)
    where, deadline = torch.device(device), time.time() + seconds if until is None else until
    with tempfile.TemporaryDirectory() as folder:
        scale = TINY if tiny else FULL
        run, goals = Run(where, scale, out, Path(folder)), goals_of(scale)
        is_well = run_parts(run.parts(), path, deadline, lambda: device_is_well(where), click.echo, goals)
        for pair in run.pairs.values():
            pair.close()
    click.echo(path.with_suffix(".md").read_text())
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
