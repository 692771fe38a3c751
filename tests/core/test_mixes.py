"""What a request writes alone it writes in any company: random mixes of everything, on little memory."""

import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.api.outputs import CompletionOutput
from nudging.core.scheduler import Scheduler
from nudging.core.work import SchedulerOutput
from nudging.policies import Policy
from tests.support.pairs import assert_pools_are_whole
from tests.support.waiting import PATIENCE

POLICIES: list[Policy] = [
    Base(),
    Guide(),
    Nudging(0.4, "token"),
    Nudging(0.4, "word"),
    Nudging(0.4, "reference", overshoot=True),
    Nudging(0.0, "token"),
    Nudging(1.5, "word"),
]
WORDS = ("apples", "left?", "Sure,", "let", "me", "think", "12", "café", "\n", "a")
# Beginnings that requests have in common, for hits in the prefix cache.
STEMS = ["Question: how many apples are left?\nAnswer:", "def speak(text):\n    return", "", ""]


@dataclass(frozen=True)
class Job:
    """One request of a mix; `options` are its drafts, priority and salt."""

    prompt: str
    params: SamplingParams
    policy: Policy
    options: tuple[tuple[str, Any], ...]

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What its text may depend on."""
        return self.prompt, repr(self.params), self.policy


def random_job(rng: random.Random) -> Job:
    prompt = rng.choice(STEMS) + " " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
    params = SamplingParams(
        max_tokens=rng.choice([1, 5, 20, 60, 110]),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        seed=rng.randrange(4),
        top_k=rng.choice([0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        stop=rng.choice([(), (), ("e", "th"), (" a",)]),
        stop_token_ids=rng.choice([(), (rng.randrange(60, 320),)]),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, None, 2]),
        logit_bias=rng.choice([None, {rng.randrange(60, 320): 4.0}]),
        n=rng.choice([1, 1, 1, 3]),
        include_stop_str_in_output=rng.random() < 0.3,
    )
    if rng.random() < 0.3:
        params = replace(
            params,
            presence_penalty=rng.choice([0.0, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            bad_words=rng.choice([(), ("e", "in the")]),
            min_tokens=rng.choice([0, 1]),
            allowed_token_ids=rng.choice([None, tuple(range(2, 320, 2))]),
        )
    policy = rng.choice(POLICIES)
    if getattr(policy, "granularity", "") == "reference":
        params = replace(params, max_tokens=min(params.max_tokens, 6), logprobs=None)
    options = {
        "speculate": rng.choice(["off", "auto", 1, 3, 8]),
        "priority": rng.choice([-1, 0, 0, 0, 2]),
        "cache_salt": rng.choice([None, None, "a"]),
    }
    return Job(prompt, params, policy, tuple(options.items()))


def shown(output: CompletionOutput) -> tuple[object, ...]:
    """All that a request's company must not change."""
    assert output.error is None, output.error
    logprobs = output.logprobs and [entry and (entry.logprob, entry.top) for entry in output.logprobs]
    return output.text, output.token_ids, output.authors, output.finish_reason, output.segments, logprobs


def preempt_at_random(scheduler: Scheduler, rng: random.Random, rate: float = 0.05) -> None:
    """Now and then take a running request's blocks, as if a higher-ranked one needed them."""
    schedule = scheduler.schedule

    def schedule_after(model: str) -> SchedulerOutput:
        if scheduler.running and rng.random() < rate:
            scheduler._preempt(rng.choice(scheduler.running))
        return schedule(model)

    scheduler.schedule = schedule_after  # type: ignore[method-assign]


def check_mixes(pair: dict[str, Path], seed: int, mixes: int, dtype: str) -> None:
    """Run `mixes` random mixes on a small engine; each text is the one written alone on a large one."""
    rng = random.Random(seed)
    alone: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
    options = {
        "dtype": dtype,
        "block_size": rng.choice([3, 4, 8]),
        "max_batch_tokens": rng.choice([9, 60, 2048]),
        "drafter": rng.choice(["guide", "guide", "ngram"]),
        "prefix_caching": rng.random() < 0.8,
    }
    memory = f"{236 if dtype == 'float32' else 118}KiB"
    with (
        LLM(**pair, dtype=dtype, kv_cache_memory="8MiB", prefix_caching=False, speculate="off") as large,
        LLM(**pair, **options, kv_cache_memory=memory) as small,
    ):
        for runner in small._engine.runners.values():
            runner.poison()
        preempt_at_random(small._engine.scheduler, random.Random(seed))
        pool = [random_job(rng) for _ in range(20)]
        for job in pool:
            [result] = large.generate(job.prompt, job.params, job.policy)
            alone[job.key] = [shown(output) for output in result.outputs]
        for mix in range(mixes):
            jobs = rng.choices(pool, k=rng.randrange(2, 20))
            handles = [small.submit(job.prompt, job.params, job.policy, **dict(job.options)) for job in jobs]
            for job, handle in zip(jobs, handles, strict=True):
                outputs = handle.result(timeout=PATIENCE).outputs
                assert [shown(output) for output in outputs] == alone[job.key], (seed, mix, options, job)
        assert_pools_are_whole(small)
        totals = small.stats().totals
    assert totals.preemptions > 0
    assert totals.cached_tokens > 0, "prompts were to be shared"
    assert totals.drafted > 0
    # What random models write seldom repeats itself: drafts that are looked up may all be wrong.
    assert totals.accepted > 0 or options["drafter"] == "ngram"


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32")])
def test_company_changes_nothing(tiny_pair: dict[str, Path], seed: int, dtype: str) -> None:
    check_mixes(tiny_pair, seed, 8, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 28))
def test_no_company_changes_anything(tiny_pair: dict[str, Path], seed: int) -> None:
    """With the fast ones, 524 mixes."""
    check_mixes(tiny_pair, seed, 20, ("float32", "bfloat16", "float16")[seed % 3])
