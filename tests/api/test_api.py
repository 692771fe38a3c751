"""The Python API as a caller meets it: results, streams, handles, open generations, and every bad input."""

import gc
import itertools
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nudging import LLM, BadRequest, Base, DeadlineExceeded, EngineClosed, Guide, Nudging, SamplingParams
from nudging.policies import Step, View
from tests.support.pairs import PROMPT, assert_pools_are_whole, one, written
from tests.support.waiting import PATIENCE, Stopped
from tests.support.weights import set_row


def test_default_policy_nudges_where_there_is_a_guide(tiny_llm: LLM, tiny_pair: dict[str, Path]) -> None:
    assert tiny_llm.default_policy == Nudging()
    with LLM(base=tiny_pair["base"], kv_cache_memory="1MiB") as alone:
        assert alone.default_policy == Base()
        assert set(one(alone).authors) <= {"base"}


def test_text_ids_and_segments_say_the_same(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.roles["base"].tokenizer
    for seed in range(8):
        output = one(tiny_llm, max_tokens=40, temperature=1.0, seed=seed, ignore_eos=True)
        assert output.text == tokenizer.text_of(output.token_ids)
        assert "".join(segment.text for segment in output.segments) == output.text
        assert sum((segment.token_ids for segment in output.segments), ()) == output.token_ids
        authors = [s.author for s in output.segments for _ in s.token_ids]
        assert tuple(authors) == output.authors
        assert output.stats.nudged_tokens == output.authors.count("guide")
        assert output.stats.tokens == len(output.token_ids) == 40


def test_ids_and_text_prompts_agree(tiny_llm: LLM) -> None:
    ids = tiny_llm.roles["base"].tokenizer.encode(PROMPT)
    assert written(one(tiny_llm, ids)) == written(one(tiny_llm, PROMPT))
    assert written(one(tiny_llm, {"base": ids, "guide": PROMPT})) == written(one(tiny_llm, PROMPT))


def test_a_stop_string_ends_the_text_before_it(tiny_llm: LLM) -> None:
    whole = one(tiny_llm, max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    middle = whole.text[12:15]
    cut = one(tiny_llm, max_tokens=40, temperature=1.0, seed=1, ignore_eos=True, stop=(middle,))
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.finish_reason == "stop"
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_n_outputs_have_their_own_seeds(tiny_llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=12)
    outputs = tiny_llm.generate(PROMPT, params)[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    for i, output in enumerate(outputs):
        assert written(output) == written(one(tiny_llm, temperature=1.0, seed=7 + i, max_tokens=12))


def test_streamed_deltas_add_up_to_the_result(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5, n=2)
    whole = tiny_llm.generate(PROMPT, params)[0].outputs
    text, ids, ends = ["", ""], [(), ()], [None, None]
    for delta in tiny_llm.stream(PROMPT, params):
        assert ends[delta.index] is None, "nothing comes after the end"
        text[delta.index] += delta.text
        ids[delta.index] += delta.token_ids
        ends[delta.index] = delta.finish_reason
    assert text == [output.text for output in whole]
    assert ids == [output.token_ids for output in whole]
    assert ends == [output.finish_reason for output in whole]


def test_leaving_a_stream_cancels_its_request(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()
    one(tiny_llm)
    assert_pools_are_whole(tiny_llm)


def test_cancel_keeps_what_was_written_and_frees_the_rest(tiny_llm: LLM) -> None:
    with Stopped(tiny_llm._engine, steps=5) as engine:
        handle = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True))
        engine.reached()
        handle.cancel()
    output = handle.result(timeout=PATIENCE).outputs[0]
    assert output.finish_reason == "abort"
    assert 0 < len(output.token_ids) < 450
    assert_pools_are_whole(tiny_llm)


def test_result_times_out_and_the_request_goes_on(tiny_llm: LLM) -> None:
    with Stopped(tiny_llm._engine):
        handle = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))
        with pytest.raises(TimeoutError, match="did not finish within"):
            handle.result(timeout=0.0)
    assert handle.result(timeout=PATIENCE).outputs[0].finish_reason == "length"


def test_a_request_past_its_timeout_ends_with_what_it_has(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second whenever it is read."""
    seconds = itertools.count()
    monkeypatch.setattr(tiny_llm._engine, "clock", lambda: float(next(seconds)))
    params = SamplingParams(max_tokens=450, ignore_eos=True)
    output = tiny_llm.generate(PROMPT, params, timeout=50.0)[0].outputs[0]
    assert output.finish_reason == "abort"
    assert isinstance(output.error, DeadlineExceeded)
    assert 0 < len(output.token_ids) < 450
    with pytest.raises(DeadlineExceeded, match="raise timeout"), tiny_llm.open(PROMPT, timeout=50.0) as text:
        text.extend(params)
    assert tiny_llm.generate(PROMPT, timeout=1e9, priority=-3)[0].outputs[0].error is None
    assert_pools_are_whole(tiny_llm)


def test_many_threads_submit_and_each_gets_its_own(tiny_llm: LLM) -> None:
    expected = {seed: written(one(tiny_llm, temperature=1.0, seed=seed)) for seed in range(12)}
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        found[seed] = written(one(tiny_llm, temperature=1.0, seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_logprobs_are_those_of_the_owner(tiny_llm: LLM) -> None:
    ids = tiny_llm.roles["base"].tokenizer.encode(PROMPT)
    output = one(tiny_llm, ids, Nudging(0.4, "token"), max_tokens=12, logprobs=3, ignore_eos=True)
    text = ids + list(output.token_ids)
    rows = {role: torch.tensor(tiny_llm.logits(role, text)) for role in ("base", "guide")}
    for i, (entry, author) in enumerate(zip(output.logprobs, output.authors, strict=True)):
        row = torch.log_softmax(rows[author][len(ids) + i - 1].double(), dim=0)
        assert entry.token == output.token_ids[i]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-9)
        assert len(entry.top) == 3
        assert entry.top[int(row.argmax())] == pytest.approx(float(row.max()), abs=1e-9)


def test_logits_are_float32_rows_of_the_whole_vocabulary(tiny_llm: LLM) -> None:
    logits = tiny_llm.logits("guide", [60, 61, 62])
    assert logits.shape == (3, 320)
    assert logits.dtype == np.float32
    with pytest.raises(BadRequest, match="no role 'expert'"):
        tiny_llm.logits("expert", [60])


@dataclass(frozen=True)
class Odd:
    """A caller's own policy that does `act` at its third token."""

    act: Any
    roles: ClassVar[tuple[str, ...]] = ("base", "guide")
    lookahead: ClassVar[int] = 0
    shares_ids: ClassVar[bool] = True
    needs_tokenizer: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True

    def start(self) -> int:
        return 0

    def step(self, view: View, state: int) -> Step:
        if state == 2:
            return self.act(view, state)
        mixed = view.row("base").logits + view.row("guide").logits
        return Step((view.pick(mixed),), "base", state=state + 1)


def divide(view: View, state: int) -> Step:
    return Step((1 // 0,))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (divide, "division"),
        (lambda view, state: Step((10**6,), "base", state=3), "ids go from 0 to 319"),
        (lambda view, state: Step(state=state), "stands still"),
    ],
)
def test_a_broken_policy_ends_only_its_own_request(tiny_llm: LLM, act: Any, message: str) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    results = tiny_llm.generate([PROMPT] * 3, params, [Nudging(), Odd(act), Base()])
    good, bad, other = (result.outputs[0] for result in results)
    assert bad.finish_reason == "error"
    assert message in str(bad.error)
    assert len(bad.token_ids) == 2, "what was written before stays"
    assert written(good) == written(one(tiny_llm, max_tokens=10, ignore_eos=True))
    assert len(other.token_ids) == 10
    assert_pools_are_whole(tiny_llm)


def test_nan_logits_end_only_their_own_request(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
        embed = llm._engine.runners["base"].decoder.weights.embed
        clean = one(llm, [70, 71, 72], Base(), max_tokens=8, ignore_eos=True, logit_bias={99: -100.0})
        set_row(embed, 99, float("nan"))
        results = llm.generate(
            [[70, 71, 72], [70, 99], [80]], SamplingParams(max_tokens=8, ignore_eos=True), Base()
        )
        assert results[1].outputs[0].finish_reason == "error"
        assert "not finite" in str(results[1].outputs[0].error)
        assert results[0].outputs[0].token_ids == clean.token_ids
        assert results[0].outputs[0].error is None
        assert_pools_are_whole(llm)


def test_nan_behind_a_refused_draft_is_nobodys_error(tiny_pair: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with LLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
        clean = written(llm.generate([70, 71], params, Nudging(0, "token"), 0)[0].outputs[0])
        guide = written(llm.generate([70, 71], params, Guide())[0].outputs[0])
        refused = next(t for t in guide.token_ids if t not in clean.token_ids)
        set_row(llm._engine.runners["base"].decoder.weights.embed, refused, float("nan"))
        drafted = llm.generate([70, 71], params, Nudging(0, "token"), 8)[0].outputs[0]
        assert drafted.stats.drafted > 0
        assert written(drafted) == clean


def test_more_requests_than_memory_wait_their_turn(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="128KiB") as llm:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        results = llm.generate([[60 + i, 61] for i in range(30)], params)
        assert all(len(result.outputs[0].token_ids) == 20 for result in results)
        assert_pools_are_whole(llm)


def test_closing_ends_everything_once(tiny_pair: dict[str, Path]) -> None:
    llm = LLM(**tiny_pair, kv_cache_memory="2MiB")
    handle = llm.submit(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True))
    generation = llm.open(PROMPT)
    llm.close()
    llm.close()
    assert handle.result(timeout=PATIENCE).outputs[0].finish_reason == "abort"
    generation.close()
    with pytest.raises(EngineClosed, match="closed"):
        llm.generate(PROMPT)


def test_closing_frees_weights_and_caches(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="1MiB") as llm:
        one(llm)
        runner = llm._engine.runners["base"]
        held = [weakref.ref(runner.cache.k), weakref.ref(runner.decoder.weights.embed)]
        del runner
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_two_engines_live_in_one_process(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="1MiB") as a, LLM(**tiny_pair, kv_cache_memory="1MiB") as b:
        assert written(one(a)) == written(one(b))
