"""What a step costs on the host, by pytest-benchmark:

    python -m pytest benchmarks/test_host_steps.py --benchmark-json=benchmarks/results/host-steps.json

The models answer at once, over few tokens: what is measured is the bookkeeping of whole steps, and a little
of torch for each pass, of which `models_us_per_step` is the fake models' own.  A step makes one pass of each
model that is needed, or several of the guide where it writes a path.  Where `carries` is False all of it is
done by the twin in Python.
"""

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.host_cost import ARMS, opinions
from nudging import SamplingParams
from nudging.core.engine import Engine
from nudging.core.request import Request
from nudging.executor.model_runner import ModelRunner
from nudging.models.batch import Batch
from nudging.models.kv_cache import KVCache
from nudging.text.chat_template import plain_chat_template
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from tests.support.fake import FakeDecoder

VOCAB = 64
# Steps before the measured ones: prompts are read and costs learned.
WARM = 12
ROUNDS = 200


class Table(FakeDecoder):
    """Rows by the last token: mostly sure, mostly of the other model's opinion."""

    def __init__(self, seed: int) -> None:
        super().__init__(lambda ids: torch.zeros(VOCAB), VOCAB)
        self.rows = opinions(VOCAB, seed, 9.0, 1.0)
        self.seconds = 0.0

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        began = time.perf_counter()
        logits = self.rows.index_select(0, batch.ids.index_select(0, batch.logit_rows))
        self.seconds += time.perf_counter() - began
        return logits


def running(arm: str, count: int, carries: bool) -> Engine:
    """An engine in the midst of `count` texts."""
    runners = {
        name: ModelRunner(Table(seed), 64 * count, 16, prefix_caching=False)
        for seed, name in enumerate(("base", "guide"), start=1)
    }
    roles = {
        name: Role(name, name, None, plain_chat_template(), frozenset(), VOCAB, 1000) for name in runners
    }
    engine = Engine(runners, {name: name for name in runners}, carries=carries)
    policy, draft_len = ARMS[arm]
    draw = random.Random(count)
    for number in range(count):
        prompts = {name: RolePrompt(draw.choices(range(VOCAB), k=20)) for name in runners}
        params = SamplingParams(max_tokens=900, ignore_eos=True)
        engine.add(Request(f"{number}", policy, params, number, prompts, roles, draft_len))
    for _ in range(WARM):
        engine.step()
    return engine


@pytest.mark.parametrize("carries", [True, False], ids=["cpp", "python"])
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("arm", ["base alone", "token, lazy", "token, k=4", "token, adaptive"])
def test_step(benchmark: Any, arm: str, count: int, carries: bool) -> None:
    torch.set_num_threads(1)
    engine = running(arm, count, carries)
    before = sum(sum(r.counters.passes.values()) for r in engine.scheduler.running)
    decoders: list[Any] = [runner.decoder for runner in engine.runners.values()]
    inside = sum(decoder.seconds for decoder in decoders)
    benchmark.pedantic(engine.step, rounds=ROUNDS)
    assert len(engine.scheduler.running) == count, "the texts are long enough"
    passes = sum(sum(r.counters.passes.values()) for r in engine.scheduler.running) - before
    benchmark.extra_info["passes_per_request_and_step"] = passes / count / ROUNDS
    # The fake models' own share of a step.
    inside = sum(decoder.seconds for decoder in decoders) - inside
    benchmark.extra_info["models_us_per_step"] = 1e6 * inside / ROUNDS
