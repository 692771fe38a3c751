"""What admission with preemption gains over reserving every request's worst case, counted and not timed.

Fake models with a real block pool: `python -m benchmarks.admission`.  A step is one pass of the model.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from nudging import Base, SamplingParams
from nudging.core import claims
from nudging.core.request import Request
from nudging.text.prompts import RolePrompt
from tests.support.fake import FixedCosts, fake_engine
from tests.support.tiny import HashModel

ASKED = 120
LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "texts of 1 to 20 tokens": lambda rng: rng.randrange(1, 21),
    "texts of 1 to 120 tokens": lambda rng: rng.randrange(1, ASKED + 1),
    "texts of 120 tokens": lambda rng: ASKED,
}
# Blocks of 4 tokens; the last one is more than any request can use.
HEADROOMS = {"0": 0, "4": 1, "16": 4, "32": 8, "worst case": 30}


class Ending(Request):
    """A request that asks for ASKED tokens and stops by itself after `length` of them."""

    length = 0

    def commit(self, token: int, author: str, logprob: object = None) -> None:
        super().commit(token, author, logprob)
        if not self.is_finished and len(self.output) == self.length:
            self.finish("stop")


def serve(length: Callable[[random.Random], int], prefix_caching: bool) -> str:
    """60 requests at once on 400 tokens of cache."""
    engine, roles = fake_engine({"base": HashModel(1)}, {"base": FixedCosts(1.0)}, 100)
    engine.runners["base"].pool.prefix_caching = prefix_caching
    rng = random.Random(5)
    jobs = []
    for i in range(60):
        prompts = {"base": RolePrompt(rng.choices(range(2, 32), k=rng.randrange(4, 40)))}
        jobs.append(Ending(f"r{i}", Base(), SamplingParams(max_tokens=ASKED), i, prompts, roles))
        jobs[-1].length = length(rng)
        engine.add(jobs[-1])
    steps = most = 0
    while engine.has_work:
        engine.step()
        steps, most = steps + 1, max(most, len(engine.scheduler.running))
    counters = [job.counters for job in jobs]
    computed = sum(len(job.prompts["base"].ids) + len(job.output) for job in jobs)
    return (
        f"{steps:5} steps, {most:3} at once, {sum(c.preemptions for c in counters):4} preemptions, "
        f"{sum(c.recomputed for c in counters):5} tokens again beside {computed}"
    )


def host_cost(running: int, waiting: int, steps: int = 200) -> str:
    """The median microseconds of admission and planning in a step of texts that are written."""
    engine, roles = fake_engine({"base": HashModel(1)}, {"base": FixedCosts(1.0)}, running * 9)
    plan, seconds = engine.scheduler.schedule, []
    for i in range(running + waiting):
        prompts = {"base": RolePrompt([2 + i % 30] * 24)}
        engine.add(Request(f"r{i}", Base(), SamplingParams(max_tokens=ASKED), i, prompts, roles))
    for _ in range(30):
        engine.step()
    for _ in range(steps):
        began = time.perf_counter()
        engine.scheduler.admit()
        plan("base")
        seconds.append(time.perf_counter() - began)
    count = len(engine.scheduler.running)
    return f"{count} run, {len(engine.scheduler.waiting)} wait: {1e6 * sorted(seconds)[steps // 2]:.0f} us"


if __name__ == "__main__":
    for name, length in LENGTHS.items():
        for headroom, blocks in HEADROOMS.items():
            claims.HEADROOM_BLOCKS = blocks
            for prefix_caching in (False, True):
                cached = "cached" if prefix_caching else "not cached"
                print(f"{name}, headroom {headroom}, {cached}: {serve(length, prefix_caching)}")
    claims.HEADROOM_BLOCKS = 1
    for running, waiting in ((64, 0), (64, 64)):
        print("admission and planning:", host_cost(running, waiting))
