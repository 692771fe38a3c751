"""What results, deltas and streams say beside the text: ends, their reasons, prompts, log-probabilities."""

import asyncio
import math
from pathlib import Path

import pytest

from nudging import (
    LLM,
    AsyncLLM,
    BadRequest,
    Base,
    DeadlineExceeded,
    Guide,
    Nudging,
    SamplingParams,
)
from tests.support.pairs import PROMPT, assert_pools_are_whole, one, written

LONG = SamplingParams(max_tokens=450, ignore_eos=True)
CHAT = [{"role": "user", "content": "How many?"}]


def test_a_result_says_what_ended_the_text(tiny_llm: LLM) -> None:
    sampled = {"max_tokens": 40, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    whole = one(tiny_llm, **sampled)
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    middle = whole.text[12:15]
    assert one(tiny_llm, **sampled, stop=["@@@", middle]).stop_reason == middle
    token = whole.token_ids[7]
    ended = one(tiny_llm, **sampled, stop_token_ids=[token])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    free = [one(tiny_llm, temperature=1.0, seed=seed, max_tokens=200) for seed in range(8)]
    own_ends = [output for output in free if output.finish_reason == "stop"]
    assert own_ends
    assert {output.stop_reason for output in own_ends} == {None}


def test_a_result_has_every_roles_prompt_as_it_was_read(tiny_llm: LLM) -> None:
    [result] = tiny_llm.chat(CHAT, SamplingParams(max_tokens=2))
    assert list(result.prompts) == ["base", "guide"]
    for role, prompt in result.prompts.items():
        tokenizer = tiny_llm.get_tokenizer(role)
        assert prompt.text == tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert list(prompt.token_ids) == tokenizer.apply_chat_template(CHAT)
        assert prompt.num_tokens == len(prompt.token_ids)
    assert (result.prompt, result.prompt_token_ids) == (
        result.prompts["base"].text,
        result.prompts["base"].token_ids,
    )
    [by_ids] = tiny_llm.generate([[60, 61]], SamplingParams(max_tokens=1), Guide())
    assert (by_ids.prompt, by_ids.prompt_token_ids) == (None, (60, 61))


def test_the_sum_of_logprobs_is_there_where_they_are(tiny_llm: LLM) -> None:
    output = one(tiny_llm, max_tokens=9, logprobs=0, ignore_eos=True)
    assert output.cumulative_logprob == math.fsum(entry.logprob for entry in output.logprobs)
    assert one(tiny_llm, max_tokens=2).cumulative_logprob is None


def test_deltas_carry_logprobs_and_the_reason_of_the_end(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, logprobs=2, ignore_eos=True)
    output = tiny_llm.generate(PROMPT, params)[0].outputs[0]
    deltas = list(tiny_llm.stream(PROMPT, params))
    assert sum((delta.logprobs for delta in deltas), ()) == output.logprobs
    assert [delta.error for delta in deltas] == [None] * len(deltas)
    assert all(delta.logprobs is None for delta in tiny_llm.stream(PROMPT))
    *_, last = tiny_llm.stream(PROMPT, SamplingParams(max_tokens=9, stop_token_ids=[output.token_ids[4]]))
    assert last.stop_reason == output.token_ids[4]


def test_a_stream_that_fails_says_why(tiny_llm: LLM) -> None:
    *_, last = tiny_llm.stream(PROMPT, LONG, timeout=0.01)
    assert last.finish_reason == "abort"
    assert isinstance(last.error, DeadlineExceeded)


def test_a_stream_refuses_bad_arguments_before_it_is_read(tiny_llm: LLM) -> None:
    with pytest.raises(BadRequest, match="the prompt is empty"):
        tiny_llm.stream("")
    with pytest.raises(BadRequest, match="messages"):
        tiny_llm.stream_chat([])

    async def use() -> None:
        async with AsyncLLM.pocket() as llm:
            with pytest.raises(BadRequest, match="the prompt is empty"):
                llm.stream("")

    asyncio.run(use())


def test_a_stream_hands_out_its_handle(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream(PROMPT, LONG, request_id="mine")
    assert stream.request_id == stream.handle.request_id == "mine"
    next(stream)
    stream.cancel()
    *_, last = stream
    assert last.finish_reason == "abort"
    assert stream.handle.result().request_id == "mine"


def test_a_conversation_streams_as_it_is_answered(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    answer = tiny_llm.chat(CHAT, params)[0].outputs[0]
    assert "".join(delta.text for delta in tiny_llm.stream_chat(CHAT, params)) == answer.text

    async def use() -> str:
        async with AsyncLLM.pocket() as llm:
            whole = (await llm.chat(CHAT, params))[0].outputs[0].text
            assert "".join([delta.text async for delta in llm.stream_chat(CHAT, params)]) == whole
            stream = llm.stream(PROMPT, LONG, request_id="mine")
            await anext(stream)
            assert llm.abort("mine")
            return (await stream.handle.result()).outputs[0].finish_reason

    assert asyncio.run(use()) == "abort"


def test_a_request_is_aborted_by_its_id(tiny_llm: LLM) -> None:
    handle = tiny_llm.submit(PROMPT, LONG, request_id="mine")
    other = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
    with pytest.raises(BadRequest, match="request_id is 'mine', which runs already"):
        tiny_llm.submit(PROMPT, request_id="mine")
    assert tiny_llm.abort("mine")
    assert handle.result().outputs[0].finish_reason == "abort"
    assert other.result().outputs[0].finish_reason == "length"
    assert not tiny_llm.abort("mine"), "it runs no more"
    assert not tiny_llm.abort("nobody's")
    assert tiny_llm.generate(PROMPT, request_id="mine")[0].request_id == "mine", "an id is free again"
    assert tiny_llm.abort(tiny_llm.submit(PROMPT, LONG).request_id)
    assert_pools_are_whole(tiny_llm)


@pytest.mark.parametrize(
    ("request_id", "message"),
    [(5, "must be None or a str"), ("", "not empty"), ("request-1", "the engine's own")],
)
def test_an_id_that_cannot_be_is_refused(tiny_llm: LLM, request_id: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        tiny_llm.submit(PROMPT, request_id=request_id)
    with pytest.raises(BadRequest, match="names one request and there are 2 prompts"):
        tiny_llm.generate([PROMPT, PROMPT], request_id="mine")
    with pytest.raises(BadRequest, match="has no option 'request_id'"):
        tiny_llm.open(PROMPT, request_id="mine")


def test_several_texts_are_scored_at_once(tiny_llm: LLM) -> None:
    continuations = [[70, 71, 72], [80], [90, 91]]
    for policy in (Base(), Nudging(0.4, "token"), Nudging(0.4, "word")):
        alone = [tiny_llm.score(PROMPT, ids, policy) for ids in continuations]
        with tiny_llm.open(PROMPT, policy) as text:
            assert [text.score(ids) for ids in continuations] == alone
        assert tiny_llm.score(PROMPT, continuations, policy) == alone
        assert tiny_llm.score([PROMPT] * 3, continuations, policy) == alone
        assert tiny_llm.score([PROMPT, [60]], [70, 71, 72], policy)[0] == alone[0]
    assert tiny_llm.score("a", ["b", "cd"]) == [tiny_llm.score("a", "b"), tiny_llm.score("a", "cd")]
    with pytest.raises(BadRequest, match="2 prompts and 3 continuations"):
        tiny_llm.score([PROMPT] * 2, continuations)
    with pytest.raises(BadRequest, match="the continuation has 512 tokens and the context has room for"):
        tiny_llm.score(PROMPT, [60] * 512)
    assert_pools_are_whole(tiny_llm)


def test_a_tokenizer_reads_and_writes_what_prompts_and_results_have(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.get_tokenizer("guide")
    ids = tokenizer.encode(PROMPT)
    assert written(one(tiny_llm, ids)) == written(one(tiny_llm, PROMPT))
    assert tokenizer.decode(ids) == PROMPT
    assert tokenizer.decode(ids[-1]) == PROMPT[-1]
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("ab", add_special_tokens=False))) == b"ab"
    assert tokenizer.vocab_size == 320
    assert tokenizer.eos_token_ids == tiny_llm.roles["guide"].eos_ids
    for wrong in (
        lambda: tokenizer.encode(None),
        lambda: tokenizer.decode("a"),
        lambda: tokenizer.decode([-1]),
    ):
        with pytest.raises(BadRequest):
            wrong()
    with pytest.raises(BadRequest, match="no role 'expert'; open are base, guide"):
        tiny_llm.get_tokenizer("expert")


def test_a_hub_id_may_have_no_owner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(hub_id: str, revision: str | None) -> Path:
        asked.append(hub_id)
        return tmp_path

    monkeypatch.setattr("nudging.api.loading.download", fetch)
    with pytest.raises(Exception, match=r"config\.json"):
        LLM("gpt2")
    assert asked == ["gpt2"]
