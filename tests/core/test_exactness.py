"""The engine writes what the straight-line twins write: tokens, authors and the reason to stop."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.arms.ours import Eager
from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.api.outputs import CompletionOutput
from nudging.policies import Policy
from tests.support import oracle
from tests.support.pairs import Outcome, Twin, assert_pools_are_whole, assert_same_text, outcome, written
from tests.support.tiny import write_tiny_checkpoint

POLICIES: list[Policy] = [
    Base(),
    Guide(),
    Nudging(0.4, "token"),
    Nudging(0.25, "token", "<="),
    Nudging(0.4, "word"),
    Nudging(0.2, "word"),
]
SEEDS = 50


def prompt_of(seed: int, vocab: int = 320) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(52, vocab) for _ in range(rng.randrange(1, 40))]


def params_of(seed: int, temperature: float) -> SamplingParams:
    """Parameters that differ with the seed: lengths, filters, biases, stop ids and strings, log-probs."""
    rng = random.Random(seed)
    return SamplingParams(
        max_tokens=rng.randrange(1, 32),
        temperature=temperature,
        seed=seed,
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        stop_token_ids=rng.choice([(), (rng.randrange(60, 320), rng.randrange(60, 320))]),
        ignore_eos=rng.random() < 0.3,
        logit_bias=rng.choice([None, {rng.randrange(60, 320): 4.0}]),
        stop=rng.choice([(), (), ("th", "e ", "7"), ("Q", " a", "\n")]),
        logprobs=rng.choice([None, None, 0, 3]),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_engine_equals_oracle_alone(tiny_llm: LLM, policy: Policy, temperature: float) -> None:
    twin = Twin(tiny_llm)
    for seed in range(SEEDS):
        prompt, params = prompt_of(seed), params_of(seed, temperature)
        output = tiny_llm.generate(prompt, params, policy)[0].outputs[0]
        assert outcome(output) == twin.outcome(prompt, params, policy), f"seed {seed}"
    assert_pools_are_whole(tiny_llm)


@pytest.mark.parametrize("speculate", ["off", "auto", 1, 3, 8])
def test_engine_equals_oracle_in_a_random_batch_drafting_or_not(tiny_llm: LLM, speculate: str | int) -> None:
    """All policies, greedy and sampled, prompts of unlike lengths: one batch."""
    outputs = check_batch(tiny_llm, random_jobs(str(speculate), 300), speculate)
    authors = [author for output in outputs for author in output.authors]
    assert 0.2 < authors.count("guide") / len(authors) < 0.8, "both sides of the threshold must occur"


@pytest.mark.parametrize(
    ("drafter", "speculate"), [("ngram", "auto"), ("ngram", 1), ("ngram", 4), ("ngram", 8), ("none", 4)]
)
def test_other_drafters_write_the_same(
    tiny_pair: dict[str, Path], drafter: str, speculate: str | int
) -> None:
    """Prompts that repeat themselves, some texts too: looked-up drafts are made, taken and refused."""
    few_words = {60: 30.0, 61: 30.0, 62: 29.0}
    jobs = [
        (prompt * 3, replace(params, logit_bias=few_words) if i % 2 else params, policy)
        for i, (prompt, params, policy) in enumerate(random_jobs(f"{drafter} {speculate}", 80))
    ]
    with LLM(**tiny_pair, kv_cache_memory="8MiB", drafter=drafter) as llm:
        stats = [output.stats for output in check_batch(llm, jobs, speculate)]
    if drafter == "none":
        assert all(s.drafted == 0 for s in stats)
    else:
        drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
        # "auto" drafts what pays by this machine's clock, which may be nothing for models this small.
        assert speculate == "auto" or 0 < accepted < drafted
        assert accepted == sum(n * count for s in stats for n, count in enumerate(s.accepted_lengths))


Job = tuple[list[int], SamplingParams, Policy]


def random_jobs(seed: str, count: int) -> list[Job]:
    jobs: list[Job] = [
        (prompt_of(number), params_of(number, temperature), policy)
        for number in range(SEEDS)
        for policy in POLICIES
        for temperature in (0.0, 1.0)
    ]
    return random.Random(seed).sample(jobs, count)


def check_batch(llm: LLM, jobs: list[Job], speculate: str | int) -> list[CompletionOutput]:
    """Run the jobs in one batch, each against its twin."""
    twin = Twin(llm)
    return check_mixed(llm, jobs, [twin.outcome(*job) for job in jobs], [speculate])


def check_mixed(
    llm: LLM, jobs: list[Job], expected: list[Outcome], speculate: Sequence[str | int]
) -> list[CompletionOutput]:
    """Run the jobs in one batch, neighbours with unlike drafts."""
    handles = [llm.submit(*job, drafts) for job, drafts in zip(jobs, itertools.cycle(speculate))]
    outputs = [handle.result().outputs[0] for handle in handles]
    for job, output, want in zip(jobs, outputs, expected, strict=True):
        assert outcome(output) == want, job
    assert_pools_are_whole(llm)
    return outputs


def test_each_role_reads_its_own_prompt(tiny_llm: LLM) -> None:
    twin = Twin(tiny_llm)
    for seed in range(10):
        prompt = {"base": prompt_of(seed), "guide": prompt_of(seed + 1000)}
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        for policy in (Nudging(0.4, "token"), Nudging(0.4, "word")):
            output = tiny_llm.generate(prompt, params, policy, speculate=4)[0].outputs[0]
            assert written(output) == twin.generate(prompt, params, policy), seed


def text_of(seed: int) -> str:
    """Some words, sometimes with the odd things that the client splits and joins texts by."""
    rng = random.Random(seed)
    words = [
        "apples",
        "left?",
        "Sure,",
        "let",
        "me",
        "think",
        "  ",
        "12",
        "café",
        "\n",
        "def speak(text):",
        "a",
    ]
    return " ".join(rng.choices(words, k=rng.randrange(1, 9))) + "?"


def test_reference_equals_the_client_on_texts_alone_and_in_a_batch(tiny_llm: LLM) -> None:
    twin = Twin(tiny_llm)
    jobs = []
    for seed in range(SEEDS):
        prompts = {"base": f"Question: {text_of(seed)}\nAnswer:", "guide": text_of(seed)}
        policy = Nudging((0.0, 0.3, 0.5, 1.5)[seed % 4], "reference", overshoot=True)
        for temperature in (0.0, 1.0):
            jobs.append((prompts, SamplingParams(max_tokens=24, temperature=temperature, seed=seed), policy))
    expected = [twin.reference(*job) for job in jobs]
    for job, want in zip(jobs, expected, strict=True):
        assert_same_text(tiny_llm.generate(*job)[0].outputs[0], want)
    prompts, params, policies = (list(column) for column in zip(*jobs, strict=True))
    for result, want in zip(tiny_llm.generate(prompts, params, policies), expected, strict=True):
        assert_same_text(result.outputs[0], want)
    assert_pools_are_whole(tiny_llm)


def test_reference_is_the_clients_text_cut_at_max_tokens(tiny_llm: LLM) -> None:
    """A promise for every granularity; what the client writes beyond has to be asked for."""
    cut = 0
    for seed in range(SEEDS):
        prompts = {"base": f"Question: {text_of(seed)}\nAnswer:", "guide": text_of(seed)}
        for most in (1, 8, 24):
            params = SamplingParams(max_tokens=most, temperature=1.0, seed=seed)
            policies = [Nudging(0.4, "reference", overshoot=True), Nudging(0.4, "reference")]
            results = tiny_llm.generate([prompts] * 2, params, policies)
            whole, output = (result.outputs[0] for result in results)
            assert output.token_ids == whole.token_ids[:most]
            assert output.authors == whole.authors[:most]
            was_cut = len(whole.token_ids) > most
            assert output.finish_reason == ("length" if was_cut else whole.finish_reason)
            cut += was_cut
    assert cut > SEEDS, "the client overshoots"


def test_extreme_thresholds_are_one_model_alone(tiny_llm: LLM) -> None:
    for seed in range(10):
        prompt = prompt_of(seed)
        params = SamplingParams(max_tokens=24, temperature=float(seed % 2), seed=seed)
        alone = [written(tiny_llm.generate(prompt, params, p)[0].outputs[0]) for p in (Base(), Guide())]
        for speculate in (0, 4):
            base = tiny_llm.generate(prompt, params, Nudging(0, "token"), speculate)[0].outputs[0]
            guide = tiny_llm.generate(prompt, params, Nudging(1.5, "token"), speculate)[0].outputs[0]
            assert [written(base), written(guide)] == alone
            assert guide.stats.base_passes == 0, "beyond 1 the base need not be asked"


def test_a_base_exactly_at_the_threshold_speaks_for_itself(tiny_llm: LLM) -> None:
    """Strict <: only the comparator "<=" gives the tie to the guide."""
    twin = Twin(tiny_llm)
    for seed in range(20):
        prompt = prompt_of(seed)
        tie = oracle.top_prob(twin.last_row("base")(prompt))
        for comparator, author in (("<", "base"), ("<=", "guide")):
            params = SamplingParams(max_tokens=1, ignore_eos=True)
            output = tiny_llm.generate(prompt, params, Nudging(tie, "token", comparator))[0].outputs[0]
            assert output.authors == (author,)


def test_a_base_that_is_its_own_guide_is_the_base(tiny_pair: dict[str, Path]) -> None:
    base = tiny_pair["base"]
    with LLM(base=base, guide=base, kv_cache_memory="4MiB") as llm:
        assert len(llm._engine.runners) == 1, "one checkpoint is loaded once"
        for granularity in ("token", "word"):
            for speculate in (0, 4):
                params = SamplingParams(max_tokens=24)
                nudged = llm.generate(prompt_of(3), params, Nudging(0.4, granularity), speculate)
                alone = llm.generate(prompt_of(3), params, Base())
                assert nudged[0].outputs[0].token_ids == alone[0].outputs[0].token_ids


def test_chunked_prompts_and_small_blocks_change_nothing(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="2MiB", max_batch_tokens=7, block_size=3) as llm:
        twin = Twin(llm)
        prompts = [prompt_of(seed) for seed in range(12)]
        params = SamplingParams(max_tokens=12)
        for policy in (Nudging(0.4, "token"), Nudging(0.4, "word")):
            for result, prompt in zip(llm.generate(prompts, params, policy), prompts, strict=True):
                assert written(result.outputs[0]) == twin.generate(prompt, params, policy)
        assert_pools_are_whole(llm)


# Who drafts, and how much: every arm writes the same as drafting nothing does.
ARMS: dict[str, list[str | int]] = {
    "guide": ["off", "auto", *range(1, 9)],
    "ngram": ["auto", *range(1, 9)],
    "none": ["auto"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "guide"),
    [
        ("gemma2", "gemma3_text"),
        ("olmo2", "olmo"),
        ("qwen2", "phi3"),
        ("mistral", "llama"),
        ("qwen3", "qwen3"),
    ],
)
def test_every_family_writes_what_its_twin_writes(base: str, guide: str, tmp_path: Path) -> None:
    """480 jobs of each pair, every one of them in every arm, in batches of unlike arms; eager, too."""
    eos = tuple(range(40, 46))
    write_tiny_checkpoint(tmp_path / "base", base, seed=5, eos=eos)
    write_tiny_checkpoint(tmp_path / "guide", guide, seed=6, hidden_size=32, eos=eos)
    listed = sorted(random_jobs(f"{base} {guide}", 480), key=lambda job: len(job[0]))
    expected: list[Outcome] = []
    ends: Counter[str] = Counter()
    for drafter, arms in ARMS.items():
        with LLM(
            base=tmp_path / "base", guide=tmp_path / "guide", kv_cache_memory="8MiB", drafter=drafter
        ) as llm:
            if not expected:
                twin = Twin(llm)
                expected = [twin.outcome(*job) for job in listed]
                check_mixed(llm, [eager(job) for job in listed], expected, ["off", 3])
            for turn in range(len(arms)):
                outputs = check_mixed(llm, listed, expected, arms[turn:] + arms[:turn])
                ends.update(output.finish_reason for output in outputs)
                if drafter == "guide":
                    assert sum(output.stats.accepted for output in outputs) > 0
    assert min(ends["stop"], ends["length"]) > 1000


def eager(job: Job) -> Job:
    """The same job by a loop that asks both models at every token."""
    prompt, params, policy = job
    if not isinstance(policy, Nudging):
        return job
    return prompt, params, Eager(policy.threshold, policy.granularity, policy.comparator)
