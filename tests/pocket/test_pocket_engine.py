"""The engine on trained models: the shipped pair, whose agreement and nudge rate are not random."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nudging import LLM, Base, Guide, Nudging, SamplingParams, pocket
from nudging.models.loader import load_model
from nudging.pocket.grade import Question, is_right, load_questions
from nudging.policies import Policy
from tests.support.pairs import Twin, assert_pools_are_whole, assert_same_text, written

TABLE = json.loads((Path(__file__).parents[2] / "benchmarks" / "pocket" / "results.json").read_text())
NAMES = ("base", "base-aligned", "guide", "guide-base", "guide-sp")
POLICIES = [Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word"), Nudging(0.2, "word")]
TEMPERATURES = (0.0, 1.0)


@pytest.fixture(scope="module")
def pair() -> Iterator[LLM]:
    with LLM.pocket(dtype="float32") as llm:
        for runner in llm._engine.runners.values():
            runner.poison()
        yield llm


def jobs(seeds: range, max_tokens: int) -> list[tuple[dict[str, str], SamplingParams, Any]]:
    """Questions in each role's own form, under every policy, greedy and sampled."""
    questions = random.Random(0).sample(load_questions(), len(seeds))
    return [
        (
            {
                "base": f"Question: {question.question}\nAnswer:",
                "guide": f"User: {question.question}\nAssistant:",
            },
            SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed),
            policy,
        )
        for seed, question in zip(seeds, questions, strict=True)
        for policy in POLICIES
        for temperature in TEMPERATURES
    ]


def encoded(llm: LLM, prompts: dict[str, str]) -> dict[str, list[int]]:
    return {name: llm.roles[name].tokenizer.encode(text) for name, text in prompts.items()}


def check(llm: LLM, listed: list[Any], speculate: str | int) -> None:
    """Alone and in one random batch: the straight-line twin's tokens, authors and ends."""
    twin = Twin(llm)
    expected = [twin.generate(encoded(llm, prompts), params, policy) for prompts, params, policy in listed]
    for (prompts, params, policy), want in zip(listed, expected, strict=True):
        assert written(llm.generate(prompts, params, policy, speculate)[0].outputs[0]) == want
    order = list(range(len(listed)))
    random.Random(1).shuffle(order)
    prompts, params, policies = (list(column) for column in zip(*(listed[i] for i in order), strict=True))
    for i, result in zip(order, llm.generate(prompts, params, policies, speculate), strict=True):
        assert written(result.outputs[0]) == expected[i]
    assert_pools_are_whole(llm)


def test_the_pocket_pair_writes_what_its_twin_writes_for_50_seeds(pair: LLM) -> None:
    check(pair, jobs(range(50), max_tokens=16), "auto")


@pytest.mark.slow
@pytest.mark.parametrize("speculate", ["off", "auto", 4])
def test_the_pocket_pair_writes_long_texts_as_its_twin_does(pair: LLM, speculate: str | int) -> None:
    check(pair, jobs(range(100, 150), max_tokens=64), speculate)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_text_is_the_same_alone_batched_and_drafted(dtype: str) -> None:
    """No tolerance: row invariance holds in 16 bits, too."""
    listed = jobs(range(8), max_tokens=32)
    prompts, params, policies = (list(column) for column in zip(*listed, strict=True))
    with LLM.pocket(dtype=dtype) as llm:
        alone = [written(llm.generate(*job, "off")[0].outputs[0]) for job in listed]
        for speculate in ("off", "auto", 5):
            batch = llm.generate(prompts, params, policies, speculate)
            assert [written(result.outputs[0]) for result in batch] == alone, speculate


@pytest.mark.parametrize("guide", ["guide", "guide-sp"])
def test_reference_on_the_pocket_pair_is_the_client(guide: str) -> None:
    """Text level, also between unlike tokenizers."""
    with LLM.pocket(guide=f"pocket:{guide}", dtype="float32") as llm:
        twin = Twin(llm)
        for prompts, params, _ in jobs(range(25), max_tokens=20)[:: len(POLICIES)]:
            policy = Nudging(0.4, "reference", overshoot=True)
            output = llm.generate(prompts, params, policy)[0].outputs[0]
            assert_same_text(output, twin.reference(prompts, params, policy))


@pytest.mark.parametrize("name", NAMES)
def test_pocket_logits_are_those_of_transformers(name: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(pocket.path(name), dtype=torch.float32)
    decoder = load_model(pocket.path(name), torch.float32)
    ids = torch.randint(0, decoder.config.vocab_size, (64,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    assert (decoder.logits(ids.tolist()) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["base", "guide"])
def test_pocket_rows_have_the_same_bits_among_1_to_16_from_1_and_2_threads(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Large enough for two threads to share the work of a few rows."""
    decoder = load_model(pocket.path(name), dtype)
    ids = random.Random(2).choices(range(decoder.config.vocab_size), k=48)
    threads(1)
    whole = decoder.logits(ids)
    for count in (1, 2):
        threads(count)
        for rows in (*range(1, 17), 48):
            assert torch.equal(decoder.logits(ids[:rows]), whole[:rows]), (count, rows)


def marks(llm: LLM, questions: list[Question], policy: Policy) -> str:
    """Which questions the engine answers right, "1" or "0" each, as the committed table has them."""
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    results = llm.chat(chats, SamplingParams(max_tokens=TABLE["max_tokens"]), policy)
    texts = (result.outputs[0].text for result in results)
    return "".join(str(int(is_right(q, text))) for q, text in zip(questions, texts, strict=True))


def assert_marks_of_the_table(pair: LLM, questions: list[Question], allowed: int) -> None:
    """The engine earns what the straight-line loop on transformers earned, but for near ties."""
    nudged = next(point["right"] for point in TABLE["sweep"] if point["threshold"] == 0.4)
    found = {
        nudged: marks(pair, questions, Nudging(0.4)),
        TABLE["arms"]["base"]["right"]: marks(pair, questions, Base()),
        TABLE["arms"]["guide"]["right"]: marks(pair, questions, Guide()),
    }
    with LLM(base="pocket:base-aligned", dtype="float32", kv_cache_memory="64MiB") as aligned:
        found[TABLE["arms"]["base-aligned"]["right"]] = marks(aligned, questions, Base())
    for expected, ours in found.items():
        assert sum(a != b for a, b in zip(expected, ours, strict=False)) <= allowed


def test_the_engine_earns_the_marks_of_the_table(pair: LLM) -> None:
    assert_marks_of_the_table(pair, load_questions()[:100], allowed=2)


@pytest.mark.slow
def test_the_engine_earns_all_marks_of_the_table(pair: LLM) -> None:
    assert_marks_of_the_table(pair, load_questions(), allowed=5)
