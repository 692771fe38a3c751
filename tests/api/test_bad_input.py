"""Every bad input is refused with the value, the limit and the remedy, and costs nobody else anything."""

import math
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from nudging import LLM, BadRequest, Base, CheckpointError, Nudging, SamplingParams
from tests.support.pairs import PROMPT, assert_pools_are_whole, one

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


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -0.1, 3, "0.4", True])
def test_a_bad_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(BadRequest, match="threshold is .*; it must be a number from 0"):
        Nudging(threshold)


def test_only_the_authors_client_overshoots() -> None:
    with pytest.raises(BadRequest, match="overshoot is for granularity='reference' and it is 'word'"):
        Nudging(overshoot=True)
    with pytest.raises(BadRequest, match="overshoot is 'yes'; it must be True or False"):
        Nudging(granularity="reference", overshoot="yes")


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


def test_max_len_shortens_the_context(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="1MiB", max_len=64) as llm:
        assert {role.max_len for role in llm.roles.values()} == {64}
        assert len(one(llm, [60] * 60, max_tokens=100, ignore_eos=True).token_ids) == 4
    with LLM(**tiny_pair, kv_cache_memory="1MiB", max_len=10_000) as llm:
        assert {role.max_len for role in llm.roles.values()} == {512}, "no longer than the checkpoints' own"


def test_a_local_path_never_touches_the_network(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a socket was opened for a local checkpoint")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with LLM(base=str(tiny_pair["base"]), kv_cache_memory="1MiB") as llm:
        assert one(llm, max_tokens=2).error is None


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be fetched from the hub.*give its directory"):
        LLM(base="nobody/has-this-model")


def test_unlike_vocabularies_are_refused_where_ids_are_shared(
    tiny_pair: dict[str, Path], tmp_path: Path
) -> None:
    from tests.support.tiny import write_tiny_checkpoint

    other = write_tiny_checkpoint(tmp_path / "other", seed=3, vocab=300)
    with LLM(base=tiny_pair["base"], guide=other, kv_cache_memory="1MiB") as llm:
        with pytest.raises(BadRequest, match="vocabularies differ.*granularity='reference'"):
            llm.generate(PROMPT, policy=Nudging(0.4, "word"))
        assert one(llm, PROMPT, Nudging(0.4, "reference"), max_tokens=8).error is None


def test_a_padded_embedding_is_the_same_vocabulary(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    from tests.support.tiny import write_tiny_checkpoint

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
        ({"drafter": "parrot"}, "drafter is .parrot.; it must be one of guide, ngram, none"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 0.5}, "priority is 0.5; it must be a whole number"),
        ({"priority": 1 << 31}, "priority is 2147483648"),
        ({"timeout": 0}, "timeout is 0; it must be None or a number of seconds above 0"),
        ({"timeout": math.nan}, "timeout is nan"),
        ({"timeout": True}, "timeout is True"),
        ({"prioritty": 1}, "did you mean 'priority'"),
    ],
    ids=str,
)
def test_a_bad_request_option_is_named_with_its_limit(tiny_llm: LLM, options: Any, message: str) -> None:
    for use in (tiny_llm.submit, tiny_llm.generate, tiny_llm.open):
        with pytest.raises(BadRequest, match=message):
            use(PROMPT, **options)


def test_lists_must_match_the_prompts(tiny_llm: LLM) -> None:
    with pytest.raises(BadRequest, match="policy has 2 entries and there are 3 prompts"):
        tiny_llm.generate([PROMPT] * 3, policy=[Base(), Base()])


def test_a_policy_without_its_role_is_refused(tiny_pair: dict[str, Path]) -> None:
    llm = LLM(base=tiny_pair["base"], kv_cache_memory="1MiB")
    with llm, pytest.raises(BadRequest, match="needs the role 'guide' and only base are open"):
        llm.generate(PROMPT, policy=Nudging())
