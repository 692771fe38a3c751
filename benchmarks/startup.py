"""How long a word of the command line takes that loads no model: `python -m benchmarks.startup`.

Prints the least, the median and the most of some processes, in milliseconds, for each word.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

WORDS = (("--help",), ("generate", "--help"), ("--version",))


def seconds(words: tuple[str, ...]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nudging", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    for words in WORDS:
        times = sorted(1000 * seconds(words) for _ in range(rounds))
        print(f"{' '.join(words)}: {times[0]:.0f} / {statistics.median(times):.0f} / {times[-1]:.0f} ms")


if __name__ == "__main__":
    main()
