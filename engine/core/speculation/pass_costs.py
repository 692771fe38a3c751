"""What a pass of each model costs on this device, learned from the passes that are made anyway."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

# So many timings of a bucket are remembered: enough against noise, few enough to follow a busy machine.
MEMORY = 10
# A pass that takes so many times what was expected was disturbed: it counts as one that takes so long.
DISTURBED = 2.0
BUCKETS = 24


class Timing(NamedTuple):
    """The passes of about so many answered rows take about so many seconds, by so many timings."""

    rows: float
    seconds: float
    times: int = 1

    def moved(self, rows: float, seconds: float) -> Timing:
        """One more pass."""
        # The first timing may have been a cold one: a much faster one replaces it at once.
        if seconds < self.seconds / DISTURBED:
            return Timing(rows, seconds)
        return self.joined(Timing(rows, min(seconds, DISTURBED * self.seconds)))

    def joined(self, other: Timing) -> Timing:
        """Both as one, of the mean rows and seconds."""
        times = min(self.times, MEMORY - 1) + other.times
        part = other.times / times
        rows = self.rows + part * (other.rows - self.rows)
        seconds = self.seconds + part * (other.seconds - self.seconds)
        return Timing(rows, seconds, min(times, MEMORY))


class CycleTime(NamedTuple):
    """What a cycle took: `passes` by role, how many of how many rows, all answered; in seconds."""

    passes: Mapping[str, tuple[int, int]]
    seconds: float


class PassCosts:
    """The seconds of a pass of one model by its rows, and by how many of them are answered.

    A row that is not answered does without the LM head: it counts as a part of one.  Timings are kept in
    buckets of powers of two and joined by straight lines; beyond the last one the line goes on, and with one
    timing alone more rows cost what those do.  Before anything was timed a pass costs what reading the
    weights does: the bound of small batches.
    """

    def __init__(self, weight_bytes: int, head_share: float, bytes_per_second: float = 1e10) -> None:
        """`head_share`: of the products of an answered row, those of the LM head."""
        self._timings: list[Timing | None] = [None] * BUCKETS
        self._head_share = head_share
        self._prior = weight_bytes / bytes_per_second
        # What was answered since the last timing: `of` is asked far more often.
        self._expected: dict[float, float] = {}
        self._line: list[Timing] = []

    def record(self, rows: int, answers: int, seconds: float) -> None:
        """One pass of `rows` rows, `answers` of which were answered, took `seconds`."""
        size = self._size(rows, answers)
        bucket = min((math.ceil(size) - 1).bit_length(), BUCKETS - 1)
        old = self._timings[bucket]
        self._timings[bucket] = Timing(size, seconds) if old is None else old.moved(size, seconds)
        self._expected.clear()
        self._line = []

    def of(self, rows: float, answers: float) -> float:
        """The expected seconds of a pass of `rows` rows, `answers` of which are answered; never less than
        for fewer.
        """
        size = self._size(rows, answers)
        if size not in self._expected:
            self._expected[size] = self._on_line(size)
        return self._expected[size]

    def _size(self, rows: float, answers: float) -> float:
        """How many answered rows take as many products."""
        return rows + self._head_share * (answers - rows)

    @property
    def line(self) -> list[Timing]:
        """The timings by rows; empty before the first."""
        self._line = self._line or rising([timing for timing in self._timings if timing is not None])
        return self._line

    @property
    def curve(self) -> tuple[float, float, list[tuple[float, float]]]:
        """What all prices are made of: the head's share, the price before the first timing, and the line."""
        return self._head_share, self._prior, [(timing.rows, timing.seconds) for timing in self.line]

    def _on_line(self, rows: float) -> float:
        line = self.line
        if not line:
            return self._prior
        after = bisect_right(line, rows, key=lambda timing: timing.rows)
        if after == 0 or len(line) == 1:
            return line[0].seconds
        left, right = line[after - 1 : after + 1] if after < len(line) else line[-2:]
        slope = (right.seconds - left.seconds) / (right.rows - left.rows)
        return left.seconds + slope * (rows - left.rows)


def learn_cycle(costs: Mapping[str, PassCosts], cycle: CycleTime) -> None:
    """Learn from a cycle, by role: what is known of its passes says which part of the time was each one's."""
    expected = {role: count * costs[role].of(rows, rows) for role, (count, rows) in cycle.passes.items()}
    scale = cycle.seconds / sum(expected.values())
    for role, (count, rows) in cycle.passes.items():
        costs[role].record(rows, rows, scale * expected[role] / count)


def rising(timings: list[Timing]) -> list[Timing]:
    """The timings by rows; neighbours of which the larger is said to cost less are joined, so that a timing
    that was disturbed and is hardly repeated speaks with its own weight only.
    """
    line: list[Timing] = []
    for timing in sorted(timings):
        while line and line[-1].seconds > timing.seconds:
            timing = line.pop().joined(timing)
        line.append(timing)
    return line
