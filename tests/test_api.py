"""The Python API as a caller meets it: results, streams, handles, open generations, and every bad input."""

import gc
import math
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nudging import LLM, BadRequest, Base, CheckpointError, EngineClosed, Guide, Nudging, SamplingParams
from nudging.policies import Step, View
from tests.pairs import assert_pools_are_whole, written

PROMPT = "How many apples are left?"


def one(llm: LLM, prompt: Any = PROMPT, policy: Any = None, **params: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**params), policy)[0].outputs[0]


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
    handle = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True))
    next(iter(handle))
    handle.cancel()
    output = handle.result(timeout=10).outputs[0]
    assert output.finish_reason == "abort"
    assert 0 < len(output.token_ids) < 450
    assert_pools_are_whole(tiny_llm)


def test_result_times_out_and_the_request_goes_on(tiny_llm: LLM) -> None:
    handle = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
    with pytest.raises(TimeoutError, match="did not finish within"):
        handle.result(timeout=0.0)
    assert handle.result(timeout=60).outputs[0].finish_reason == "length"


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


class TestGeneration:
    def test_two_extensions_write_what_one_does(self, tiny_llm: LLM) -> None:
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

    def test_a_fork_goes_its_own_way(self, tiny_llm: LLM) -> None:
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

    def test_rewind_takes_the_same_way_again(self, tiny_llm: LLM) -> None:
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        with tiny_llm.open(PROMPT, Nudging(0.4, "token")) as generation:
            first = generation.extend(params)
            generation.rewind(5)
            generation.extend(SamplingParams(max_tokens=7, ignore_eos=True))
            assert tuple(generation.token_ids) == first.token_ids
            with pytest.raises(BadRequest, match="rewind to 13; the text has 12 tokens"):
                generation.rewind(13)

    def test_a_score_is_the_owners_logprob_of_each_token(self, tiny_llm: LLM) -> None:
        params = SamplingParams(max_tokens=15, logprobs=0, ignore_eos=True)
        for policy in (Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word")):
            output = tiny_llm.generate(PROMPT, params, policy)[0].outputs[0]
            scores = tiny_llm.score(PROMPT, list(output.token_ids), policy)
            assert scores == [entry.logprob for entry in output.logprobs], "a policy scores its own text so"
        assert_pools_are_whole(tiny_llm)

    def test_idle_generations_give_way_and_come_back(self, tiny_pair: dict[str, Path]) -> None:
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        with LLM(**tiny_pair, kv_cache_memory="128KiB") as llm:
            total = llm._engine.runners["base"].pool.total
            prompt = list(range(60, 60 + (total - 4) * 16 - 40))
            expected = llm.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True))[0].outputs[0]
            generation = llm.open(prompt)
            generation.extend(params)
            assert llm._engine.runners["base"].pool.num_free < total
            one(llm, prompt[1:], max_tokens=10)
            generation.policy = Nudging(0.4, "word")
            assert len(generation.extend(params).token_ids) == 10
            assert tuple(generation.token_ids[:10]) == expected.token_ids[:10]
            generation.close()
            assert_pools_are_whole(llm)


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
        embed[99] = float("nan")
        results = llm.generate(
            [[70, 71, 72], [70, 99], [80]], SamplingParams(max_tokens=8, ignore_eos=True), Base()
        )
        assert results[1].outputs[0].finish_reason == "error"
        assert "not finite" in str(results[1].outputs[0].error)
        assert results[0].outputs[0].token_ids == clean.token_ids
        assert results[0].outputs[0].error is None
        assert_pools_are_whole(llm)


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
    assert handle.result(timeout=5).outputs[0].finish_reason == "abort"
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


BAD_PARAMS = [
    {"max_tokens": 0},
    {"max_tokens": 2.5},
    {"temperature": -1},
    {"temperature": math.nan},
    {"top_p": 0},
    {"top_k": -1},
    {"min_p": 2},
    {"seed": -1},
    {"stop": ("",)},
    {"stop_token_ids": (-1,)},
    {"logprobs": 1000},
    {"logit_bias": {1: math.inf}},
    {"n": 0},
    {"max_token": 3},
]


@pytest.mark.parametrize("params", BAD_PARAMS, ids=str)
def test_a_bad_parameter_is_named_with_its_limit(params: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=next(iter(params))):
        SamplingParams(**params)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -0.1, 3, "0.4", True, None])
def test_a_bad_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(BadRequest, match="threshold is .*; it must be a number from 0"):
        Nudging(threshold)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([320], "holds 320, which is no token id of 'base': ids go from 0 to 319"),
        ([-1], "no token id"),
        ([1.0], "no token id"),
        ([60] * 512, "has 512 tokens and the context of 'base' is 512"),
        ({"base": "a"}, "also needs 'guide'"),
        (b"abc", "prompt is a bytes"),
        (3, "prompt is a int"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused_before_anything_runs(tiny_llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        tiny_llm.submit(prompt)
    assert_pools_are_whole(tiny_llm)


def test_what_memory_can_never_hold_is_refused(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="64KiB") as llm:
        with pytest.raises(BadRequest, match="may need .* tokens of cache in model .*raise kv_cache_memory"):
            llm.submit([60] * 400)
        assert one(llm, [60, 61], max_tokens=2).finish_reason in ("length", "stop")


def test_a_text_ends_where_the_context_does(tiny_llm: LLM) -> None:
    for policy in (Base(), Nudging(0.4, "token"), Nudging(0.4, "word")):
        output = one(tiny_llm, [60] * 500, policy, max_tokens=100, ignore_eos=True)
        assert (len(output.token_ids), output.finish_reason) == (12, "length")


def test_unlike_vocabularies_are_refused_where_ids_are_shared(
    tiny_pair: dict[str, Path], tmp_path: Path
) -> None:
    from tests.tiny import write_tiny_checkpoint

    other = write_tiny_checkpoint(tmp_path / "other", seed=3, vocab=300)
    with LLM(base=tiny_pair["base"], guide=other, kv_cache_memory="1MiB") as llm:
        with pytest.raises(BadRequest, match="vocabularies differ.*granularity='reference'"):
            llm.generate(PROMPT, policy=Nudging(0.4, "word"))
        assert one(llm, PROMPT, Nudging(0.4, "reference"), max_tokens=8).error is None


def test_a_padded_embedding_is_the_same_vocabulary(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    from tests.tiny import write_tiny_checkpoint

    padded = write_tiny_checkpoint(tmp_path / "padded", seed=3, padded_vocab=384)
    with LLM(base=tiny_pair["base"], guide=padded, kv_cache_memory="1MiB") as llm:
        output = one(
            llm, PROMPT, Nudging(0.5, "token"), max_tokens=40, ignore_eos=True, temperature=1.0, seed=2
        )
        assert "guide" in output.authors
        assert max(output.token_ids) < 320


def test_a_checkpoint_without_a_tokenizer_works_with_ids(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    for role, path in tiny_pair.items():
        (tmp_path / role).mkdir()
        for file in path.iterdir():
            if "token" not in file.name:
                (tmp_path / role / file.name).write_bytes(file.read_bytes())
    with LLM(base=tmp_path / "base", guide=tmp_path / "guide", kv_cache_memory="1MiB") as llm:
        output = one(llm, [60, 61], Nudging(0.4, "token"))
        assert output.text is None
        for bad in (lambda: llm.submit("text"), lambda: llm.submit([60], policy=Nudging())):
            with pytest.raises(BadRequest, match="no tokenizer"):
                bad()
        with pytest.raises(BadRequest, match="stop strings need a tokenizer"):
            llm.submit([60], SamplingParams(stop="a"), Nudging(0.4, "token"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_memory": "2 parsecs"}, "kv_cache_memory"),
        ({"kv_cache_memory": 100}, "at least"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"speculate": 99}, "speculate is 99"),
        ({"block_size": 0}, "block_size is 0"),
        ({"kv_cache_memroy": "1GiB"}, "did you mean 'kv_cache_memory'"),
        ({"models": {"guide": "x"}}, "argument of its own"),
    ],
    ids=str,
)
def test_a_bad_option_is_named_with_its_limit(tiny_pair: dict[str, Path], options: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        LLM(**tiny_pair, **options)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(base=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="config.json"):
        LLM(base=tmp_path)


def test_lists_must_match_the_prompts(tiny_llm: LLM) -> None:
    with pytest.raises(BadRequest, match="policy has 2 entries and there are 3 prompts"):
        tiny_llm.generate([PROMPT] * 3, policy=[Base(), Base()])


def test_a_policy_without_its_role_is_refused(tiny_pair: dict[str, Path]) -> None:
    llm = LLM(base=tiny_pair["base"], kv_cache_memory="1MiB")
    with llm, pytest.raises(BadRequest, match="needs the role 'guide' and only base are open"):
        llm.generate(PROMPT, policy=Nudging())
