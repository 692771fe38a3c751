"""Open generations: extend, fork, rewind, score, and giving way to others."""

from pathlib import Path
from typing import Any

import pytest

from nudging import LLM, BadRequest, Base, Guide, Nudging, SamplingParams
from tests.support.pairs import PROMPT, assert_pools_are_whole, one
from tests.support.simulated import VOCAB, Setup, SimLLM
from tests.support.simulation import Broken


def test_two_extensions_write_what_one_does(tiny_llm: LLM) -> None:
    policy = Nudging(0.4, "token")
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    whole = tiny_llm.generate(PROMPT, params, policy)[0].outputs[0]
    half = SamplingParams(max_tokens=10, temperature=1.0, seed=11, ignore_eos=True)
    with tiny_llm.open(PROMPT, policy) as generation:
        generation.extend(half)
        second = generation.extend(half)
        assert tuple(generation.token_ids) == whole.token_ids
        assert tuple(generation.authors) == whole.authors
        assert generation.text == whole.text
        assert second.stats.base_passes <= 11, "the first ten tokens are not computed again"
    assert_pools_are_whole(tiny_llm)


def test_a_fork_goes_its_own_way(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with tiny_llm.open(PROMPT) as generation:
        generation.extend(params)
        with generation.fork() as fork:
            fork.extend(text=" left")
            changed = fork.extend(params)
            same = generation.extend(params)
        again = tiny_llm.generate(
            PROMPT, SamplingParams(max_tokens=18, ignore_eos=True), Nudging(0.4, "token")
        )
        assert len(again[0].outputs[0].token_ids) == 18
        assert changed.token_ids != same.token_ids
    assert_pools_are_whole(tiny_llm)


def test_rewind_takes_the_same_way_again(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with tiny_llm.open(PROMPT, Nudging(0.4, "token")) as generation:
        first = generation.extend(params)
        generation.rewind(5)
        generation.extend(SamplingParams(max_tokens=7, ignore_eos=True))
        assert tuple(generation.token_ids) == first.token_ids
        with pytest.raises(BadRequest, match="rewind to 13; the text has 12 tokens"):
            generation.rewind(13)


def test_a_score_is_the_owners_logprob_of_each_token(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=15, logprobs=0, ignore_eos=True)
    for policy in (Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word")):
        output = tiny_llm.generate(PROMPT, params, policy)[0].outputs[0]
        scores = tiny_llm.score(PROMPT, list(output.token_ids), policy)
        assert scores == [entry.logprob for entry in output.logprobs], "a policy scores its own text so"
    assert_pools_are_whole(tiny_llm)


def test_idle_generations_give_way_and_come_back(tiny_pair: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    with LLM(**tiny_pair, kv_cache_memory="128KiB") as llm:
        total = llm._engine.runners["base"].pool.total
        prompt = list(range(60, 60 + (total - 4) * 16 - 40))
        expected = llm.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True))[0].outputs[0]
        generation = llm.open(prompt)
        generation.extend(params)
        assert llm._engine.runners["base"].pool.num_available < total
        one(llm, prompt[1:], max_tokens=10)
        generation.policy = Nudging(0.4, "word")
        assert len(generation.extend(params).token_ids) == 10
        assert tuple(generation.token_ids[:10]) == expected.token_ids[:10]
        generation.close()
        assert_pools_are_whole(llm)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda text: text.extend(SamplingParams(n=2)), r"n is 2; .* fork\(\) it for more"),
        (lambda text: text.extend(text=[]), "the continuation is empty"),
        (
            lambda text: text.extend(text=[2, VOCAB]),
            f"holds {VOCAB}, .*: ids go from 0 to {VOCAB - 1}",
        ),
        (lambda text: text.extend(text=[-1]), "holds -1"),
        (lambda text: text.extend(text=[True]), "holds True"),
        (lambda text: text.extend(text="word"), "this checkpoint has no tokenizer; give token ids"),
        (lambda text: text.rewind(-1), "rewind to -1; the text has 2 tokens"),
        (lambda text: text.rewind(10**30), f"rewind to {10**30}; the text has 2 tokens"),
        (lambda text: text.begin(5), "sampling_params is 5; give SamplingParams"),
        (lambda text: text.score([]), "the continuation is empty"),
    ],
)
def test_a_bad_use_is_refused_and_the_text_stays(use: Any, message: str) -> None:
    with SimLLM(Setup(has_text=False), threaded=True) as llm, llm.open([2, 3], Base()) as text:
        text.extend(text=[4, VOCAB - 1])
        with pytest.raises(BadRequest, match=message):
            use(text)
        assert (text.token_ids, text.authors) == ([4, VOCAB - 1], ["caller"] * 2)
        assert len(text.extend(SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3


def test_a_closed_text_is_closed_once_and_refuses_everything() -> None:
    with SimLLM(Setup(), threaded=True) as llm:
        text = llm.open([2, 3])
        text.extend(SamplingParams(max_tokens=3, ignore_eos=True))
        text.close()
        text.close()
        uses: list[Any] = [text.extend, lambda: text.extend(text=[4]), text.fork, lambda: text.rewind(0)]
        for use in (*uses, lambda: text.score([2])):
            with pytest.raises(BadRequest, match=r"this generation was closed; open\(\) another"):
                use()
        pools = [runner.pool for runner in llm.runners]
        assert [pool.num_available for pool in pools] == [pool.total for pool in pools]


def test_a_policy_that_names_no_owner_cannot_score() -> None:
    no_owner = pytest.raises(BadRequest, match="cannot score given texts: it has no method `owner`")
    with SimLLM(Setup(), threaded=True) as llm, llm.open([2, 3], Broken("raises", 2)) as text, no_owner:
        text.score([4])
