"""Schedules of recorded cycles, each from a seed.

`python -m tests.support.cycle_schedules --seed N` replays one. A schedule is a short life of a server
(`simulation.py`) whose models run from recordings on a device that is late (`simulated_cycles.py`). All that
depends elsewhere on a clock or on which thread comes first is drawn: which lengths of drafts pay and when
they change, when the device is done with what, what takes how long, when texts come, are cancelled,
preempted or late, what is recorded ahead. One to twelve texts, greedy and sampled, with rows that are NaN,
are held to the oracle after every step.
"""

import argparse
import random
import time
from collections import Counter
from typing import Any

from nudging import Base, Guide, Nudging, SamplingParams
from nudging.core.executor import record_ahead
from nudging.policies.protocol import Policy
from tests.support.simulated_cycles import CycleLLM, CycleSetup, Device, late_device
from tests.support.simulation import Life, World

STEPS = 40


class Schedule(Life):
    """What happens to one server whose models run from recordings, all of it from one seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.pace, self.is_lean, self.refused, self.known = 1, False, 0, [[2, 3]]
        self.setup = self._draw_setup()
        self.device = Device(random.Random(rng.random()))
        self.world = World(self.setup, rng.choice((1, 3, 9)), CycleLLM(self.setup, self.device))
        self.crowd = rng.choice((1, 2, 3, 3, 5, 8, 12))
        # Mostly one policy and one length of drafts: texts that have nothing in common share no cycle.
        self.policies = [self._draw_policy() for _ in range(rng.choice((1, 1, 2, 4)))]
        self.speculate = [self._draw_speculate() for _ in range(rng.choice((1, 1, 2)))]
        self.comes, self.leaves, self.preempts = rng.choice((0.1, 0.4, 0.8)), rng.choice((0, 0, 0.05)), 0.02
        self.changes, self.length = rng.choice((0.0, 0.05, 0.3, 1.0)), 3
        self.lengths = rng.choice(((3,), (3, 5), (1, 2, 3, 4), (0, 3, 8), (0, 1, 2, 3, 4, 5, 8, 15)))

    def _draw_setup(self) -> CycleSetup:
        rng = self.rng
        block_size = rng.choice((1, 2, 4, 4, 8, 16))
        tokens = rng.choice((90, 140, 300, 1000, 1000))
        return CycleSetup(
            block_size=block_size,
            blocks=(tokens // block_size, tokens // block_size),
            max_batch_tokens=rng.choice((8, 64, 2048, 2048)),
            max_len=rng.choice((48, 160)),
            one_model=rng.random() < 0.1,
            padding=rng.choice((0, 3)),
            agreement=rng.choice((2, 4, 11)),
            prefix_caching=rng.random() < 0.7,
            guide_seconds=rng.choice((0.1, 0.5, 2.0)),
            nan_in=rng.choice((0, 0, 0, 200)),
            patience=rng.choice((1, 2, 32)),
            record_ahead=rng.choice((0.0, 0.0, 0.5)),
        )

    def _draw_policy(self) -> Policy:
        rng = self.rng
        kind = rng.random()
        if kind < 0.15:
            return rng.choice((Base(), Guide()))
        granularity = "word" if kind > 0.95 and not self.setup.nan_in else "token"
        return Nudging(rng.choice(self.thresholds), granularity, rng.choice(("<", "<=")))

    def _draw_speculate(self) -> Any:
        return self.rng.choice(("auto", "auto", "auto", "off", 1, 2, 3, 4, 8, 15))

    def pays(self, limit: int) -> int:
        """The length of drafts that pays now."""
        if self.rng.random() < self.changes:
            self.length = self.rng.choice(self.lengths)
        return self.length

    def run(self, steps: int) -> None:
        with late_device(self.device, self.setup, self.pays):
            super().run(steps)

    def counts(self) -> dict[str, int]:
        """What has happened."""
        world, device = self.world, self.device
        return {
            "schedules": 1,
            "turns": world.turns,
            "texts": sum(world.finished.values()),
            "preemptions": world.preemptions,
            "cycles": device.cycles,
            "waited for while a later one was under way": device.ahead,
            **world.finished,
        }

    def disturb(self) -> None:
        rng, world = self.rng, self.world
        while rng.random() < self.comes and len(world.jobs) < self.crowd:
            self._try(self._submit)
        if world.jobs and rng.random() < self.leaves:
            world.cancel(rng.choice(world.jobs))
        running = world.engine.scheduler.running
        if running and rng.random() < self.preempts:
            world.preempt(rng.choice(running))
        if rng.random() < 0.03:
            self._try(self._use_a_generation)
        if not world.engine.has_work and rng.random() < self.setup.record_ahead:
            record_ahead(world.engine.runners.values())

    def _submit(self) -> None:
        rng = self.rng
        policy, speculate = rng.choice(self.policies), rng.choice(self.speculate)
        options = self._options() if rng.random() < 0.2 else {}
        self.world.submit(
            self._prompt(policy), self._params(), policy, speculate, rng.random() < 0.5, **options
        )

    def _policy(self) -> Policy:
        return self.rng.choice(self.policies)

    def _params(self, n: int | None = None) -> SamplingParams:
        rng = self.rng
        is_plain = rng.random() < 0.85
        params = SamplingParams(
            max_tokens=rng.choice((1, 2, 5, 12, 24, 40)),
            temperature=rng.choice((0.0, 0.0, 1.0)),
            top_k=0 if is_plain else rng.choice((0, 20)),
            seed=rng.getrandbits(64),
            stop=() if is_plain else rng.choice((("?",), (" a", "a of", "é"))),
            stop_token_ids=rng.choice(((), (), (5,))),
            ignore_eos=rng.random() < 0.5,
            logit_bias=None if is_plain else rng.choice((None, {7: 4.0})),
            n=n or rng.choice((1, 1, 1, 1, 2, 4)),
        )
        return params if is_plain or rng.random() < 0.6 else self._in_python(params)


def run(seed: int, steps: int = STEPS) -> Schedule:
    """One schedule.  An error in it says how it is replayed."""
    schedule = Schedule(seed)
    try:
        schedule.run(steps)
    except BaseException as error:
        error.add_note(f"replay with: python -m tests.support.cycle_schedules --seed {seed} --steps {steps}")
        raise
    return schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many schedules from there on")
    parser.add_argument("--steps", type=int, default=STEPS, help="turns before clients stop coming")
    options = parser.parse_args()
    began, total = time.perf_counter(), Counter[str]()
    for seed in range(options.seed, options.seed + options.count):
        done = run(seed, options.steps)
        total.update(done.counts())
        if options.count == 1:
            print(done.setup, done.world.finished, f"digest {done.world.digest:08x}")
    print(*(f"{count} {what}," for what, count in total.items()), f"in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
