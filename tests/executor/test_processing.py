"""What is done to logits before a token is picked: masks, biases and penalties, by text, drafted or not."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nudging import LLM, BadRequest, Base, Guide, Nudging, NumericalError, SamplingParams
from nudging.core.past import Past
from nudging.executor.processing import processed
from nudging.executor.sampler import checked_row, logprob_of, pick_token
from nudging.policies import Policy, Step, View
from tests.core.test_mixes import preempt_at_random
from tests.support import oracle
from tests.support.pairs import (
    PROMPT,
    Twin,
    as_oracle_params,
    assert_pools_are_whole,
    assert_same_text,
    one,
    outcome,
)

POLICIES: list[Policy] = [Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word")]
VOCAB = 320


def params_of(seed: int) -> SamplingParams:
    """One in a few parameters is on, in all mixtures."""
    rng = random.Random(seed)
    return SamplingParams(
        max_tokens=rng.randrange(8, 24),
        min_tokens=rng.choice([0, 0, 4, 8]),
        temperature=rng.choice([0.0, 1.0]),
        seed=seed,
        top_k=rng.choice([0, 0, 20]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5, -2.0]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7, -0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.6]),
        bad_words=rng.choice([(), ("e", "th"), (" a", "in the", "7")]),
        allowed_token_ids=rng.choice([None, None, tuple(range(40, VOCAB, 3))]),
        logit_bias=rng.choice([None, {rng.randrange(60, VOCAB): 4.0}]),
        stop_token_ids=rng.choice([(), tuple(rng.choices(range(60, VOCAB), k=20))]),
        stop=rng.choice([(), ("th", "e ", "7"), (" a", "\n")]),
        include_stop_str_in_output=rng.random() < 0.5,
        skip_special_tokens=rng.random() < 0.5,
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice([None, None, 2]),
    )


def prompt_of(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(52, VOCAB) for _ in range(rng.randrange(1, 30))]


JOBS = [(prompt_of(i), params_of(i), POLICIES[i % len(POLICIES)]) for i in range(60)]


def test_the_texts_are_the_oracles_in_a_batch_with_all_drafts(tiny_llm: LLM) -> None:
    twin = Twin(tiny_llm)
    expected = [twin.outcome(*job) for job in JOBS]
    for arm in range(4):
        drafts: list[str | int] = ["off", "auto", 2, 8]
        handles = [tiny_llm.submit(*job, drafts[(i + arm) % 4]) for i, job in enumerate(JOBS)]
        outputs = [handle.result(600).outputs[0] for handle in handles]
        for job, output, want in zip(JOBS, outputs, expected, strict=True):
            assert outcome(output) == want, job
    assert sum(output.stats.accepted for output in outputs) > 0
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert_pools_are_whole(tiny_llm)


def test_preemption_and_looked_up_drafts_change_nothing(tiny_pair: dict[str, Path]) -> None:
    jobs = [(prompt * 2, params, policy) for prompt, params, policy in JOBS[:24]]
    with LLM(**tiny_pair, kv_cache_memory="1MiB", block_size=4, drafter="ngram") as llm:
        preempt_at_random(llm._engine.scheduler, random.Random(0), rate=0.3)
        twin = Twin(llm)
        handles = [llm.submit(*job, 4) for job in jobs]
        outputs = [handle.result(600).outputs[0] for handle in handles]
        for job, output in zip(jobs, outputs, strict=True):
            assert outcome(output) == twin.outcome(*job), job
        assert llm.stats().totals.preemptions > 0


def test_the_text_level_client_hears_of_them_too(tiny_llm: LLM) -> None:
    twin = Twin(tiny_llm)
    for seed in range(8):
        params = replace(params_of(seed), max_tokens=12, stop=(), stop_token_ids=(), logprobs=None)
        params = replace(params, min_tokens=6, repetition_penalty=1.5, skip_special_tokens=True)
        prompts = {"base": "Question: left?\nAnswer:", "guide": f"apples {seed}?"}
        policy = Nudging((0.0, 0.3, 0.5, 1.5)[seed % 4], "reference")
        want = twin.reference(prompts, params, policy)
        got = tiny_llm.generate(prompts, params, policy)[0].outputs[0]
        if len(got.token_ids) < params.max_tokens:
            assert_same_text(got, want)
        assert want.text.startswith(got.text or "")


def test_an_open_text_goes_on_as_if_it_had_never_stopped(tiny_llm: LLM) -> None:
    """What was written before is output, not prompt."""
    params = SamplingParams(
        max_tokens=12, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2, ignore_eos=True,
        bad_words=("in the", "e"), temperature=1.0, seed=3,
    )  # fmt: skip
    for policy in (Base(), Nudging(0.4, "token")):
        whole = one(tiny_llm, PROMPT, policy, **{k: getattr(params, k) for k in params.__dataclass_fields__})
        with tiny_llm.open(PROMPT, policy) as text:
            text.extend(replace(params, max_tokens=5))
            with text.fork() as fork:
                fork.extend(replace(params, max_tokens=7))
                assert tuple(fork.token_ids) == whole.token_ids
            text.extend(replace(params, max_tokens=7))
            assert tuple(text.token_ids) == whole.token_ids


def test_each_role_has_its_own_prompt_as_past(tiny_llm: LLM) -> None:
    twin = Twin(tiny_llm)
    for seed in range(6):
        prompt = {"base": prompt_of(seed), "guide": prompt_of(seed + 100)}
        params = SamplingParams(max_tokens=16, repetition_penalty=3.0, ignore_eos=True)
        got = tiny_llm.generate(prompt, params, Nudging(0.4, "token"), 4)[0].outputs[0]
        assert outcome(got) == twin.outcome(prompt, params, Nudging(0.4, "token"))
        assert len(set(got.authors)) == 2 or seed != 0


def test_how_sure_the_base_is_knows_nothing_of_them(tiny_llm: LLM) -> None:
    """With penalties that make every position look unsure, the same role owns the first one."""
    for seed in range(12):
        plain = one(tiny_llm, prompt_of(seed), Nudging(0.4, "token"), max_tokens=1, ignore_eos=True)
        bent = one(
            tiny_llm, prompt_of(seed), Nudging(0.4, "token"), max_tokens=1, ignore_eos=True,
            repetition_penalty=50.0, allowed_token_ids=[60, 61, 62], presence_penalty=2.0,
        )  # fmt: skip
        assert plain.authors == bent.authors
        assert bent.token_ids[0] in (60, 61, 62)


def random_row(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def test_a_row_is_changed_token_by_token() -> None:
    for seed in range(60):
        params, rng = params_of(seed), random.Random(seed)
        prompt, output = rng.choices(range(VOCAB + 9), k=12), rng.choices(range(VOCAB), k=20)
        params = replace(params, bad_words=(), min_tokens=0)
        past = Past(prompt, output, frozenset(rng.choices(range(VOCAB + 9), k=seed % 3)))
        straight = oracle.changed(random_row(seed), as_oracle_params(params), oracle.Past(prompt, output))
        straight[[token for token in past.banned if token < VOCAB]] = -torch.inf
        assert torch.equal(processed(random_row(seed), params, past), straight)


def test_penalties_are_vllms() -> None:
    """repetition_penalty over prompt and output by sign, the others over the output alone."""
    row = torch.tensor([2.0, -2.0, 1.0, -1.0, 4.0])
    past = Past([0, 1], [2, 2, 3], frozenset())
    params = SamplingParams(repetition_penalty=2, frequency_penalty=0.25, presence_penalty=1)
    assert processed(row, params, past).tolist() == [1.0, -4.0, 0.5 - 1.5, -2.0 - 1.25, 4.0]
    assert row.tolist() == [2.0, -2.0, 1.0, -1.0, 4.0], "the row itself stays"


def test_min_tokens_holds_ends_stop_ids_and_stop_strings_off(tiny_llm: LLM) -> None:
    prompt = prompt_of(1)
    free = one(tiny_llm, prompt, Base(), max_tokens=20, ignore_eos=True)
    first, text = free.token_ids[0], free.text or ""
    assert one(tiny_llm, prompt, Base(), max_tokens=20, stop_token_ids=[first]).token_ids == ()
    held = one(tiny_llm, prompt, Base(), max_tokens=20, stop_token_ids=[first], min_tokens=5)
    assert len(held.token_ids) >= 5
    assert first not in held.token_ids[:5]
    character = next(c for c in text if c.isascii())
    assert len(one(tiny_llm, prompt, Base(), max_tokens=20, ignore_eos=True, stop=character).token_ids) < 20
    kept = one(tiny_llm, prompt, Base(), max_tokens=9, min_tokens=9, ignore_eos=True, stop=character)
    assert (kept.token_ids, kept.finish_reason) == (free.token_ids[:9], "length")
    with pytest.raises(BadRequest, match=r"min_tokens is 9; it must be a whole number from 0 to 8"):
        SamplingParams(max_tokens=8, min_tokens=9)


def test_a_stop_string_stays_where_it_is_asked_for(tiny_llm: LLM) -> None:
    prompt = prompt_of(1)
    text = one(tiny_llm, prompt, Base(), max_tokens=20, ignore_eos=True).text or ""
    stop = text[5:7]
    cut = one(tiny_llm, prompt, Base(), max_tokens=20, ignore_eos=True, stop=stop)
    kept = one(
        tiny_llm, prompt, Base(), max_tokens=20, ignore_eos=True, stop=stop, include_stop_str_in_output=True
    )
    assert kept.text == (cut.text or "") + stop
    assert (kept.finish_reason, kept.token_ids) == ("stop", cut.token_ids)
    streamed = tiny_llm.stream(
        prompt,
        SamplingParams(max_tokens=20, ignore_eos=True, stop=stop, include_stop_str_in_output=True),
        Base(),
    )
    assert "".join(delta.text for delta in streamed) == kept.text


def test_special_tokens_are_written_out_where_asked_for(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.roles["base"].tokenizer
    assert tokenizer is not None
    [special] = [tokenizer.eos_id]
    assert special is not None
    options = {"max_tokens": 2, "ignore_eos": True, "allowed_token_ids": [special]}
    assert one(tiny_llm, [60], Base(), **options).text == ""
    name = tokenizer.shown_bytes(special).decode()
    assert name
    assert one(tiny_llm, [60], Base(), **options, skip_special_tokens=False).text == 2 * name
    stopped = one(tiny_llm, [60], Base(), **options, skip_special_tokens=False, stop=name)
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_without_max_tokens_a_text_goes_to_the_end_of_the_context(tiny_llm: LLM) -> None:
    for policy in (Base(), Nudging(0.4, "word")):
        output = one(tiny_llm, [60] * 490, policy, max_tokens=None, ignore_eos=True)
        assert (len(output.token_ids), output.finish_reason) == (22, "length")


def test_bad_words_are_not_written(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.roles["base"].tokenizer
    assert tokenizer is not None
    lengths = set()
    for seed in range(12):
        options = {"max_tokens": 30, "ignore_eos": True}
        ids = one(tiny_llm, prompt_of(seed), Base(), **options).token_ids
        for n in (1, 2):
            word = tokenizer.text_of(ids[9 : 9 + n])
            spelled = tokenizer.spellings(word)
            if tuple(ids[9 : 9 + n]) not in spelled or "\ufffd" in word:
                continue
            barred = one(tiny_llm, prompt_of(seed), Base(), **options, bad_words=[word]).token_ids
            assert barred[9 : 9 + n] != ids[9 : 9 + n]
            for spelling in spelled:
                assert all(barred[i : i + len(spelling)] != spelling for i in range(30))
            lengths.add(n)
    assert lengths == {1, 2}


def test_where_no_token_is_left_that_request_alone_says_so(tiny_llm: LLM) -> None:
    eos = min(tiny_llm.roles["base"].eos_ids)
    bad = SamplingParams(allowed_token_ids=[eos], min_tokens=3)
    handles = [tiny_llm.submit([60, 61], params, Base()) for params in (bad, SamplingParams(max_tokens=5))]
    error, fine = (handle.result(60).outputs[0] for handle in handles)
    assert isinstance(error.error, NumericalError)
    assert "allowed_token_ids, bad_words and min_tokens together exclude" in str(error.error)
    assert fine.error is None


@dataclass(frozen=True)
class Picks(Base):
    """A caller's policy that picks from what `bend` makes of the base's logits."""

    how: str = "plain"

    needs_logits: ClassVar[bool] = True

    def step(self, view: View, state: Any) -> Step:
        token = view.pick(BEND[self.how](view.row("base").logits))
        return Step(finish="stop") if view.is_eos("base", token) else Step((token,), "base")


def with_value(value: float, count: int = 1) -> Any:
    def bend(row: Tensor) -> Tensor:
        row = row.clone()
        row[3 : 3 + count] = value
        return row

    return bend


BEND: dict[str, Any] = {
    "plain": lambda row: row,
    "fp64": lambda row: row.double(),
    "numpy": lambda row: row.numpy(),
    "nan": with_value(float("nan")),
    "inf": with_value(float("inf")),
    "two infs": with_value(float("inf"), 2),
    "nothing left": lambda row: torch.full_like(row, -torch.inf),
    "fp16": lambda row: (row * 1e4).half() * 100,
    "a matrix": lambda row: row[None],
    "cut": lambda row: row[:7],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", BEND)
def test_what_a_policy_picks_from_is_a_row_or_its_request_ends(
    tiny_llm: LLM, how: str, temperature: float
) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=temperature, seed=1, top_p=0.9)
    bent, beside = (tiny_llm.submit(PROMPT, params, policy) for policy in (Picks(how), Base()))
    output, want = bent.result(60).outputs[0], beside.result(60).outputs[0]
    assert want.error is None
    if how in ("plain", "fp64", "numpy"):
        assert output.token_ids == want.token_ids
        return
    assert output.finish_reason == "error"
    assert output.token_ids == (), "no token comes from no logits"
    wrong_shape = how in ("a matrix", "cut")
    assert isinstance(output.error, BadRequest if wrong_shape else NumericalError), output.error


def test_a_policy_picks_under_the_penalties_of_its_text(tiny_llm: LLM) -> None:
    for seed in range(6):
        params = replace(params_of(seed), stop=(), presence_penalty=2.0)
        bent, plain = (tiny_llm.submit(PROMPT, params, policy) for policy in (Picks(), Base()))
        assert bent.result(60).outputs[0].token_ids == plain.result(60).outputs[0].token_ids


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-30, 1e-6])
def test_the_least_temperatures_are_greedy(tiny_llm: LLM, temperature: float) -> None:
    for policy in POLICIES:
        options = {"max_tokens": 12, "ignore_eos": True, "seed": 5}
        want = outcome(one(tiny_llm, PROMPT, policy, **options))
        for filters in ({}, {"top_p": 0.5, "top_k": 9, "min_p": 1.0}, {"top_p": 5e-324, "min_p": 5e-324}):
            cold = one(tiny_llm, PROMPT, policy, **options, **filters, temperature=temperature)
            assert outcome(cold) == want


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (torch.full((5,), torch.nan), NumericalError),
        ([0.0, float("inf"), 0.0, 0.0, 0.0], NumericalError),
        (torch.zeros(5, dtype=torch.complex64), BadRequest),
        (torch.zeros(2, 5), BadRequest),
    ],
)
def test_a_row_is_checked(row: Sequence[float], error: type[Exception]) -> None:
    with pytest.raises(error):
        checked_row(row, 5)


def test_extremes_leave_finite_picks() -> None:
    row = torch.tensor([3e38, -3e38, 0.0, 1.0])
    for params in (
        SamplingParams(presence_penalty=2, frequency_penalty=-2, logit_bias={0: 100}),
        SamplingParams(repetition_penalty=100, temperature=100, seed=0, min_p=1),
    ):
        assert pick_token(row, params, 0, 0, Past([0, 1], [0, 1, 2], frozenset())) == 0
    with pytest.raises(NumericalError, match="with biases and penalties are not finite"):
        pick_token(row, SamplingParams(repetition_penalty=0.01), 0, 0, Past([0], [], frozenset()))


@pytest.mark.parametrize("policy", [Base(), Guide(), Nudging(0.4, "word"), Nudging(1.5, "token")], ids=str)
def test_prompt_logprobs_are_the_models_own(tiny_pair: dict[str, Path], policy: Policy) -> None:
    """In chunks, beside others, with the prompt in the cache already: always all of them."""
    prompt = prompt_of(3) * 3
    with LLM(**tiny_pair, kv_cache_memory="1MiB", max_batch_tokens=7, block_size=4) as llm:
        role = "guide" if policy == Guide() else "base"
        logits = Twin(llm).last_row(role)
        want: list[Any] = [None]
        for i in range(1, len(prompt)):
            want.append(logprob_of(logits(prompt[:i]), prompt[i], 3))
        params = SamplingParams(
            max_tokens=6, seed=1, temperature=1.0, n=2, prompt_logprobs=3, ignore_eos=True
        )
        plain = llm.generate(prompt, replace(params, prompt_logprobs=None), policy)[0]
        assert plain.prompt_logprobs is None
        preempt_at_random(llm._engine.scheduler, random.Random(1), rate=0.05)
        for result in llm.generate([prompt, prompt], params, policy):
            assert result.prompt_logprobs == tuple(want)
            assert list(map(outcome, result.outputs)) == list(map(outcome, plain.outputs))
        assert llm.generate([60], replace(params, n=1), policy)[0].prompt_logprobs == (None,)
        assert_pools_are_whole(llm)


def test_prompt_logprobs_are_refused_where_nobody_hears_of_them(tiny_llm: LLM) -> None:
    with tiny_llm.open(PROMPT) as text, pytest.raises(BadRequest, match="use generate"):
        text.extend(SamplingParams(prompt_logprobs=1))


def test_the_likeliest_tokens_are_those_of_a_whole_sort() -> None:
    row = random_row(1).round()  # with many ties
    row[50:90] = -torch.inf
    logprobs = torch.log_softmax(row.double(), dim=0)
    order = sorted(range(VOCAB), key=lambda token: (-float(logprobs[token]), token))
    for count in (0, 1, 5, 64, VOCAB, VOCAB + 9):
        found = logprob_of(row, 7, count)
        assert list(found.top.items()) == [(token, float(logprobs[token])) for token in order[:count]]
        assert found.logprob == float(logprobs[7])
