"""A pair that agrees less: its guide is disturbed until so few of the base's tokens are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.arms.arm import Limits, Prompts
from benchmarks.arms.ours import EngineArm
from benchmarks.pair import agreement
from benchmarks.rounds import Record
from nudging import LLM, LoadedModel

# Halvings of an interval of disturbances, which begins at none and this.
STEPS, MOST = 10, 8.0


@contextmanager
def disturbed(model: LoadedModel, amount: float) -> Iterator[None]:
    """Inside, the weights of the model's last norm are off by `amount` of themselves, at random."""
    norm = model.decoder.weights.norm
    assert norm is not None
    kept = norm.clone()
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0)).to(norm.device)
    try:
        norm.copy_(kept.float() * (1 + amount * noise))
        yield
    finally:
        norm.copy_(kept)


def texts_of(arm: EngineArm, prompts: Sequence[Prompts], limits: Limits) -> list[Record]:
    """What the arm writes, as `agreement` reads it."""
    return [Record(arm, [[arm.run(prompt, limits) for prompt in prompts]])]


def amount_for(
    share: float, llm: LLM, guide: LoadedModel, arm: EngineArm, prompts: Sequence[Prompts], limits: Limits
) -> float:
    """How much the guide has to be disturbed to agree at `share` of the base's tokens in texts of the arm.

    The texts are those of the guide as it is, and then those of the guide that was found with them.
    """
    amount = 0.0
    for _ in range(2):
        with disturbed(guide, amount):
            records = texts_of(arm, prompts, limits)
        low, high = 0.0, MOST
        for _ in range(STEPS):
            amount = (low + high) / 2
            with disturbed(guide, amount):
                found = agreement(llm, prompts, records)
            low, high = (amount, high) if found is None or found > share else (low, amount)
    return amount
