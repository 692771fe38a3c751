"""The engine writes what the straight-line twins write: tokens, authors and the reason to stop."""

import random
from pathlib import Path

import pytest

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.policies import Policy
from tests import oracle
from tests.pairs import Twin, assert_pools_are_whole, assert_same_text, written
from tests.tiny import write_tiny_checkpoint

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
    """Parameters that differ with the seed: lengths, filters, biases, stop ids."""
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
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_engine_equals_oracle_alone(tiny_llm: LLM, policy: Policy, temperature: float) -> None:
    twin = Twin(tiny_llm)
    for seed in range(SEEDS):
        prompt, params = prompt_of(seed), params_of(seed, temperature)
        output = tiny_llm.generate(prompt, params, policy)[0].outputs[0]
        assert written(output) == twin.generate(prompt, params, policy), f"seed {seed}"
    assert_pools_are_whole(tiny_llm)


@pytest.mark.parametrize("speculate", ["off", "auto", 1, 3, 8])
def test_engine_equals_oracle_in_a_random_batch_drafting_or_not(tiny_llm: LLM, speculate: str | int) -> None:
    """All policies, greedy and sampled, prompts of unlike lengths: one batch."""
    twin = Twin(tiny_llm)
    jobs = [
        (prompt_of(seed), params_of(seed, temperature), policy)
        for seed in range(SEEDS)
        for policy in POLICIES
        for temperature in (0.0, 1.0)
    ]
    random.Random(str(speculate)).shuffle(jobs)
    jobs = jobs[:300]
    prompts, params, policies = (list(column) for column in zip(*jobs, strict=True))
    results = tiny_llm.generate(prompts, params, policies, speculate=speculate)
    for job, result in zip(jobs, results, strict=True):
        assert written(result.outputs[0]) == twin.generate(*job), job
    authors = [author for result in results for author in result.outputs[0].authors]
    assert 0.2 < authors.count("guide") / len(authors) < 0.8, "both sides of the threshold must occur"
    assert_pools_are_whole(tiny_llm)


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
        policy = Nudging((0.0, 0.3, 0.5, 1.5)[seed % 4], "reference")
        for temperature in (0.0, 1.0):
            jobs.append((prompts, SamplingParams(max_tokens=24, temperature=temperature, seed=seed), policy))
    expected = [twin.reference(*job) for job in jobs]
    for job, want in zip(jobs, expected, strict=True):
        assert_same_text(tiny_llm.generate(*job)[0].outputs[0], want)
    prompts, params, policies = (list(column) for column in zip(*jobs, strict=True))
    for result, want in zip(tiny_llm.generate(prompts, params, policies), expected, strict=True):
        assert_same_text(result.outputs[0], want)
    assert_pools_are_whole(tiny_llm)


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
    eos = tuple(range(40, 46))
    write_tiny_checkpoint(tmp_path / "base", base, seed=5, eos=eos)
    write_tiny_checkpoint(tmp_path / "guide", guide, seed=6, hidden_size=32, eos=eos)
    with LLM(base=tmp_path / "base", guide=tmp_path / "guide", kv_cache_memory="8MiB") as llm:
        twin = Twin(llm)
        for speculate in ("off", "auto", 1, 2, 4, 8):
            jobs = [
                (prompt_of(seed), params_of(seed, temperature), policy)
                for seed in range(40)
                for policy in POLICIES
                for temperature in (0.0, 1.0)
            ]
            prompts, params, policies = (list(column) for column in zip(*jobs, strict=True))
            results = llm.generate(prompts, params, policies, speculate=speculate)
            for job, result in zip(jobs, results, strict=True):
                assert written(result.outputs[0]) == twin.generate(*job), (speculate, job)
        assert_pools_are_whole(llm)
