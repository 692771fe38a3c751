"""What a pass of each model costs on this device, learned from the passes that are made anyway."""

from __future__ import annotations

# A new timing moves the estimate by this much: slow enough for noise, quick enough for a busy machine.
SMOOTHING = 0.1
BUCKETS = 24


class PassCosts:
    """The seconds of a pass of one model by its number of rows, in buckets of powers of two.

    Before anything was timed a pass costs what reading the weights does, however few the rows: the bound of
    small batches.  A bucket that was not timed yet costs what the next smaller one does.
    """

    def __init__(self, weight_bytes: int, bytes_per_second: float = 1e10) -> None:
        self._seconds: list[float | None] = [None] * BUCKETS
        self._prior = weight_bytes / bytes_per_second
        # What `of` answered for each bucket since the last timing: it is asked far more often.
        self._expected: dict[int, float] = {}

    def record(self, rows: int, seconds: float) -> None:
        """One pass of `rows` rows took `seconds`."""
        bucket = min((rows - 1).bit_length(), BUCKETS - 1)
        old = self._seconds[bucket]
        # The first timing may have been a cold one: a much faster one replaces it at once.
        if old is None or seconds < old / 2:
            self._seconds[bucket] = seconds
        else:
            self._seconds[bucket] = old + SMOOTHING * (seconds - old)
        self._expected.clear()

    def of(self, rows: int) -> float:
        """The expected seconds of a pass of `rows` rows; never less than for fewer rows."""
        bucket = min((rows - 1).bit_length(), BUCKETS - 1)
        if bucket not in self._expected:
            smaller = [cost for cost in self._seconds[: bucket + 1] if cost is not None]
            larger = (cost for cost in self._seconds[bucket:] if cost is not None)
            self._expected[bucket] = max(smaller) if smaller else next(larger, self._prior)
        return self._expected[bucket]
