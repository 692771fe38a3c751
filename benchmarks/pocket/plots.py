"""Draw what was measured: `python benchmarks/pocket/plots.py` reads results.json and train_log.jsonl here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)

HERE = Path(__file__).resolve().parent
BASE, GUIDE, PAIR, ALIGNED = "#3b6fb6", "#e08a2c", "#2f9e62", "#8a8a8a"


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def arms(results: dict[str, Any]) -> None:
    """Accuracy by arm, on what can be answered and on what must be refused."""
    nudged = next(point for point in results["sweep"] if point["threshold"] == 0.4)
    shown = {
        "base": (results["arms"]["base"], BASE),
        "guide": (results["arms"]["guide"], GUIDE),
        "nudged, 0.4": (nudged, PAIR),
        "base-aligned": (results["arms"]["base-aligned"], ALIGNED),
    }
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for axis, group in zip(axes, ("answerable", "refusals"), strict=True):
        heights = [100 * arm["accuracy"][group] for arm, _ in shown.values()]
        bars = axis.bar(list(shown), heights, color=[color for _, color in shown.values()])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_title(f"{group} questions", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_ylim(0, 110)
    axes[0].set_ylabel("right, %")
    save(figure, "arms.png")


def sweep(results: dict[str, Any]) -> None:
    """Accuracy, the guide's share and the agreement over the threshold."""
    points = results["sweep"]
    at = [point["threshold"] for point in points]
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot(
        at, [100 * p["accuracy"]["answerable"] for p in points], "o-", color=PAIR, label="answerable, right"
    )
    axis.plot(
        at, [100 * p["accuracy"]["refusals"] for p in points], "s--", color=PAIR, label="refusals, right"
    )
    axis.plot(
        at, [100 * p["agreement"] for p in points], "^-", color=BASE, label="guide agrees with the base"
    )
    axis.plot(at, [100 * p["guide_share"] for p in points], "v-", color=GUIDE, label="written by the guide")
    axis.axhline(
        100 * results["arms"]["base-aligned"]["accuracy"]["answerable"],
        color=ALIGNED,
        ls=":",
        label="base-aligned",
    )
    axis.set(xlabel="threshold", ylabel="%", ylim=(0, 105))
    axis.legend(fontsize=7, loc="center right")
    save(figure, "sweep.png")


def uncertainty(results: dict[str, Any]) -> None:
    """How sure the base is: by position, by part of the answer, where it differs from the aligned model."""
    measured = results["uncertainty"]
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(10, 2.8))
    by_position = measured["mean_top_prob_by_position"]
    first.plot(range(len(by_position)), by_position, "o-", ms=3, color=BASE)
    first.set(xlabel="token of the answer", ylabel="the base's top probability", ylim=(0, 1.02))
    for part, color in (("style", GUIDE), ("content", BASE)):
        counts = measured["top_probs_by_part"][part]
        second.plot([b / 20 for b in range(21)], [c / sum(counts) for c in counts], color=color, label=part)
    second.set(xlabel="the base's top probability", ylabel="share of tokens")
    second.legend(fontsize=7)
    differs = [100 * (rate or 0.0) for rate in measured["differs_by_top_prob"]]
    third.bar([b / 10 + 0.05 for b in range(10)], differs, width=0.09, color=BASE)
    third.set(xlabel="the base's top probability", ylabel="differs from base-aligned, %")
    save(figure, "uncertainty.png")


def losses(log: list[dict[str, Any]]) -> None:
    """The loss of every stage over its steps."""
    stages: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        stages.setdefault(entry["stage"], []).append((entry["step"], entry["loss"]))
    figure, axis = plt.subplots(figsize=(6, 3))
    for name, curve in stages.items():
        axis.plot(*zip(*curve, strict=True), label=name, lw=1.2)
    axis.set(xlabel="step", ylabel="loss, nats per token", yscale="log")
    axis.legend(fontsize=7)
    save(figure, "losses.png")


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    arms(results)
    sweep(results)
    uncertainty(results)
    losses([json.loads(line) for line in (HERE / "train_log.jsonl").read_text().splitlines()])


if __name__ == "__main__":
    main()
