"""Arms side by side: warmed up, interleaved, in fresh random order, and held to writing what they must."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.arms.arm import Arm, Limits, Prompts, Sample


@dataclass
class Record:
    """All that one arm did: a list of samples, one for each prompt, for each round."""

    arm: Arm
    rounds: list[list[Sample]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """The records by arm, and before each round: the machine's load average and what `probe` found."""

    records: list[Record]
    load_averages: list[float]
    probes: list[float]


class DifferentText(AssertionError):
    """Two arms that must write one text wrote two."""


def run_rounds(
    arms: Sequence[Arm],
    prompts: Sequence[Prompts],
    limits: Limits,
    rounds: int,
    seed: int,
    probe: Callable[[], float] = lambda: 0.0,
    advance: Callable[[str], None] = lambda name: None,
) -> Run:
    """Run every arm on every prompt, `rounds` times after one round that does not count.

    The order of the arms is drawn anew for each prompt, so that what else the machine does hits all alike.
    `advance` is called with the name of the arm that comes next.  Raises DifferentText.
    """
    rng = random.Random(seed)
    records = {arm.name: Record(arm) for arm in arms}
    texts: dict[tuple[str, int], tuple[str, Sample]] = {}
    loads, probes = [], []
    for number in range(rounds + 1):
        loads.append(os.getloadavg()[0])
        probes.append(probe())
        samples: dict[str, list[Sample]] = {arm.name: [] for arm in arms}
        for index, prompt in enumerate(prompts):
            for arm in rng.sample(list(arms), len(arms)):
                advance(arm.name)
                sample = arm.run(prompt, limits)
                check_text(arm, index, sample, texts)
                samples[arm.name].append(sample)
        if number > 0:
            for name, of_arm in samples.items():
                records[name].rounds.append(of_arm)
    return Run(list(records.values()), loads[1:], probes[1:])


def check_text(
    arm: Arm, prompt: int, sample: Sample, texts: dict[tuple[str, int], tuple[str, Sample]]
) -> None:
    """Raise DifferentText where tokens or authors differ from the first text of the same name."""
    if arm.text is None:
        return
    name, first = texts.setdefault((arm.text, prompt), (arm.name, sample))
    if (sample.token_ids, sample.authors) != (first.token_ids, first.authors):
        raise DifferentText(
            f"prompt {prompt}: {arm.name!r} wrote {sample.token_ids} and {name!r} {first.token_ids}; "
            f"both must write the same {arm.text} text"
        )
