"""What callers hand in is theirs again at once: changing it changes no request that runs."""

import asyncio
import copy
import dataclasses
import inspect
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nudging import LLM, AsyncLLM, BadRequest, Base, SamplingParams
from nudging.core.frozen import owned, snapshot
from nudging.policies import Step, View
from tests.support.pairs import PROMPT, one
from tests.support.waiting import PATIENCE

ALL = {
    "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["a"],
    "stop_token_ids": [4], "ignore_eos": True, "logprobs": 2, "logit_bias": {7: 1.5}, "n": 2, "min_tokens": 1,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.25, "bad_words": ["b"],
    "allowed_token_ids": [5, 6], "include_stop_str_in_output": True, "skip_special_tokens": False,
    "prompt_logprobs": 1,
}  # fmt: skip
# What numbers become in other hands.
AS_NUMPY: dict[type, Callable[[Any], Any]] = {int: np.int64, float: np.float64, bool: np.bool_}


def test_all_parameters_are_named_here() -> None:
    assert list(ALL) == list(inspect.signature(SamplingParams).parameters)


def test_params_are_a_value() -> None:
    params = SamplingParams(**ALL)
    copies = [copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))]
    copies += [dataclasses.replace(params), SamplingParams(**ALL)]
    assert all(other == params and hash(other) == hash(params) for other in copies)
    assert len({params, *copies}) == 1
    assert params != dataclasses.replace(params, logit_bias={7: 1.0})
    assert eval(repr(params), {"SamplingParams": SamplingParams}) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        params.logit_bias[8] = 1.0  # type: ignore[index]


def test_params_keep_nothing_of_what_they_are_made_from() -> None:
    lists = {name: value for name, value in ALL.items() if isinstance(value, list | dict)}
    given = copy.deepcopy(lists)
    params, want = SamplingParams(**given), SamplingParams(**lists)
    for value in given.values():
        value.clear()
    assert params == want


@pytest.mark.parametrize("name", ALL)
def test_none_is_the_default(name: str) -> None:
    params = SamplingParams(**{name: None})
    assert params == (SamplingParams() if name != "max_tokens" else SamplingParams(max_tokens=None))
    assert SamplingParams(max_tokens=None).max_tokens is None, "as far as the context goes"


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    want = SamplingParams(**ALL)
    as_numpy = {k: AS_NUMPY[type(v)](v) if type(v) in AS_NUMPY else v for k, v in ALL.items()}
    as_numpy |= {"stop_token_ids": np.array([4]), "allowed_token_ids": np.array([5, 6], dtype=np.int32)}
    as_numpy["logit_bias"] = {np.int64(7): np.float32(1.5)}
    as_torch = {k: torch.tensor(v) if type(v) in AS_NUMPY else v for k, v in ALL.items()}
    as_torch |= {"stop_token_ids": torch.tensor([4]), "allowed_token_ids": [torch.tensor(5), torch.tensor(6)]}
    as_torch["logit_bias"] = {7: torch.tensor(1.5)}
    for given in (as_numpy, as_torch):
        params = SamplingParams(**given)
        assert {k: type(getattr(params, k)) for k in ALL} == {k: type(getattr(want, k)) for k in ALL}
        assert dataclasses.replace(params, temperature=0.5, top_p=0.9, min_p=0.1) == dataclasses.replace(
            want, temperature=0.5, top_p=0.9, min_p=0.1
        )
    assert SamplingParams(logit_bias={"7": 1}).logit_bias == {7: 1.0}, "JSON has no other keys"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e308}, {"temperature": math.inf}, {"temperature": True}, {"temperature": "hot"},
        {"temperature": 10**400}, {"temperature": np.float32("nan")}, {"top_p": -5e-324},
        {"top_p": 1.0000001},
        {"top_k": 1 << 31}, {"min_p": -1}, {"seed": 1 << 64}, {"seed": 1.5}, {"repetition_penalty": 0},
        {"repetition_penalty": math.inf}, {"repetition_penalty": -1}, {"repetition_penalty": 1e-320},
        {"presence_penalty": 2.1}, {"frequency_penalty": math.nan}, {"logit_bias": {5: 101}},
        {"logit_bias": {5: math.nan}}, {"logit_bias": {-5: 1}}, {"logit_bias": [5]}, {"logit_bias": {"x": 1}},
        {"min_tokens": -1}, {"min_tokens": 17}, {"bad_words": [""]}, {"bad_words": [3]}, {"bad_words": 3},
        {"allowed_token_ids": []}, {"allowed_token_ids": ["a"]}, {"allowed_token_ids": 7},
        {"include_stop_str_in_output": 1}, {"skip_special_tokens": "no"}, {"prompt_logprobs": -1},
        {"stop": {"a": 1}}, {"stop": b"a"}, {"stop_token_ids": "12"}, {"max_tokens": 1 << 21},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name_and_limit(params: dict[str, Any]) -> None:
    [name] = params
    with pytest.raises(BadRequest, match=rf"^{name} is .*; it must be "):
        SamplingParams(**params)


def test_a_bias_that_is_changed_while_a_request_runs_changes_nothing(tiny_llm: LLM) -> None:
    options = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 1}
    want = one(tiny_llm, PROMPT, Base(), **options, logit_bias={70: 2.0}).token_ids
    bias, prompt, stop = {70: 2.0}, tiny_llm.roles["base"].tokenizer.encode(PROMPT), ["zzzz"]  # type: ignore[union-attr]
    handle = tiny_llm.submit(prompt, SamplingParams(**options, logit_bias=bias, stop=stop), Base())
    for token in range(60, 400):
        bias[token] = 100.0
    prompt.clear()
    stop[:] = ["a", "e"]
    assert handle.result(60).outputs[0].token_ids == want


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
def test_ids_that_no_model_has_are_refused_at_every_door(tiny_llm: LLM, name: str) -> None:
    params = SamplingParams(**{name: {320: 1.0} if name == "logit_bias" else [320]})  # type: ignore[arg-type]
    chat = [{"role": "user", "content": "a"}]
    for ask in (tiny_llm.submit, tiny_llm.generate, tiny_llm.stream):
        with pytest.raises(BadRequest, match=f"{name} names token 320; ids go from 0 to 319"):
            ask(PROMPT, params)
    with pytest.raises(BadRequest, match=f"{name} names token 320"):
        tiny_llm.chat(chat, params)
    with tiny_llm.open(PROMPT) as text:
        with pytest.raises(BadRequest, match=f"{name} names token 320"):
            text.extend(params)
        assert text.extend(SamplingParams(max_tokens=2)).error is None


@dataclass(frozen=True)
class Lists(Base):
    """A caller's policy whose fields can be changed; it writes its list."""

    ids: list[int] = field(default_factory=list)
    biases: Any = None
    inner: tuple[Any, ...] = ()
    gate: threading.Event = field(default_factory=threading.Event)

    needs_logits: ClassVar[bool] = True

    def step(self, view: View, state: Any) -> Step:
        view.row("base")
        self.gate.wait(PATIENCE)
        index = state or 0
        if index == len(self.ids):
            return Step(finish="stop")
        return Step((self.ids[index],), "base", state=index + 1)


def test_a_policys_lists_that_are_changed_while_it_runs_change_nothing(tiny_llm: LLM) -> None:
    policy = Lists([60, 61, 62])
    handle = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=9), policy)
    policy.ids[:] = [999]
    policy.gate.set()
    assert handle.result(60).outputs[0].token_ids == (60, 61, 62)
    policy = Lists([60, 61, 62])
    with tiny_llm.open(PROMPT, policy) as text:
        policy.ids.clear()
        policy.gate.set()
        assert text.extend().token_ids == (60, 61, 62)


def test_a_policy_is_owned_where_it_can_change() -> None:
    base, bias = Base(), np.ones(3)
    assert owned(base) is base
    assert owned(Base) is Base, "a class is refused by who reads it"
    policy = Lists([1], torch.zeros(2), ({"a": [1]}, bias))
    own = owned(policy)
    policy.ids.append(2)
    policy.biases[0] = 1
    policy.inner[0]["a"].append(2)
    bias[0] = 5
    assert (own.ids, own.biases.tolist(), own.inner[0]) == ([1], [0, 0], {"a": [1]})
    assert own.inner[1].tolist() == [1, 1, 1]
    assert own.gate is policy.gate, "what is no container is shared"
    with pytest.raises(BadRequest, match="ids of Lists cannot be copied"):
        owned(Lists([threading.Lock()]))  # type: ignore[list-item]


def test_what_a_coroutine_was_given_is_its_own_from_its_first_step_on(tiny_pair: dict[str, Path]) -> None:
    """Conversations and prompts are read on another thread, while the caller goes on."""

    async def ask() -> None:
        async with AsyncLLM(**tiny_pair, kv_cache_memory="1MiB") as llm:
            params = SamplingParams(max_tokens=8, ignore_eos=True)
            messages, ids = [{"role": "user", "content": "a b"}], [60, 61, 62]
            want = [await llm.chat(messages, params), await llm.generate([ids], [params])]
            given, prompts, each = copy.deepcopy(messages), [list(ids)], [params]
            async with llm._turn:
                tasks = [asyncio.create_task(llm.chat(given, params))]
                tasks.append(asyncio.create_task(llm.generate(prompts, each)))
                await asyncio.sleep(0)
                given[0]["content"] = "something else"
                prompts[0][:] = [99]
                each.clear()
            got = [await task for task in tasks]
            assert [[r.outputs[0].token_ids for r in one] for one in got] == [
                [r.outputs[0].token_ids for r in one] for one in want
            ]

    asyncio.run(ask())


def test_a_snapshot_goes_down_to_values() -> None:
    array, messages = np.arange(3), [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    value = ([1, 2, 3], messages, {"base": [4]}, array, "text", Lists([1]), (range(3), None))
    copied = snapshot(value)
    value[0].append(4)
    messages[0]["content"][0]["text"] = "b"  # type: ignore[index]
    value[2]["base"].clear()
    array[:] = 9
    value[5].ids.append(2)
    assert copied[:3] == (
        [1, 2, 3],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        {"base": [4]},
    )
    assert (copied[3].tolist(), copied[4], copied[5].ids, copied[6]) == (
        [0, 1, 2],
        "text",
        [1],
        (range(3), None),
    )
    iterator = iter([1])
    assert snapshot(iterator) is iterator
