"""Whatever is given to a public method: it is served, or refused as BadRequest in words; nothing raw."""

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nudging import LLM, AsyncLLM, BadRequest, Base, CheckpointError, Nudging, SamplingParams
from nudging.api.llm_options import LLMOptions
from tests.support.pairs import PROMPT, assert_pools_are_whole, one, written

QUICK = SamplingParams(max_tokens=1)


class Strange:
    """An object of no kind that anybody expects."""


# Made anew for each use: some can be read once only.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "object": Strange,
    "class": lambda: Strange,
    "function": lambda: len,
    "str": lambda: "nudging",
    "empty str": lambda: "",
    "half a character": lambda: "\ud800",
    "bytes": lambda: b"ab",
    "int": lambda: 60,
    "negative": lambda: -1,
    "huge": lambda: 1 << 70,
    "bool": lambda: True,
    "float": lambda: 0.5,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "complex": lambda: 1j,
    "numpy int": lambda: np.int64(60),
    "numpy float": lambda: np.float32(0.5),
    "numpy nan": lambda: np.float32(math.nan),
    "numpy bool": lambda: np.True_,
    "numpy ids": lambda: np.array([60, 61]),
    "numpy rows": lambda: np.array([[60, 61], [62, 63]]),
    "numpy floats": lambda: np.array([0.5]),
    "numpy empty": lambda: np.array([]),
    "numpy objects": lambda: np.array([None, Strange()], dtype=object),
    "tensor": lambda: torch.tensor([60, 61]),
    "scalar tensor": lambda: torch.tensor(60),
    "meta tensor": lambda: torch.empty(3, device="meta"),
    "list": lambda: [60, 61],
    "empty list": lambda: [],
    "list of None": lambda: [None],
    "list of objects": lambda: [Strange()],
    "list of str": lambda: ["ab", "c"],
    "mixed list": lambda: [60, "a"],
    "nested list": lambda: [[[60]]],
    "tuple": lambda: (60,),
    "set": lambda: {60},
    "dict": lambda: {"base": "a", "guide": "b"},
    "empty dict": dict,
    "dict of ints": lambda: {1: 2},
    "dict of None": lambda: {None: None},
    "generator": lambda: (token for token in (60, 61)),
    "empty generator": lambda: (token for token in ()),
    "iterator of texts": lambda: iter(["ab", "c"]),
    "range": lambda: range(60, 63),
    "path": lambda: Path("nowhere"),
    "params": lambda: QUICK,
    "policy": Base,
    "listener": lambda: print,
}
# Endings that a caller is told of in words.
TOLD = (BadRequest, CheckpointError)


def attempt(use: Callable[[], Any]) -> Any:
    """What a use gives; None where it is refused in words."""
    try:
        return use()
    except TOLD:
        return None


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_sampling_params_are_read_or_refused(field: str) -> None:
    for make in VALUES.values():
        attempt(lambda make=make: SamplingParams(**{field: make()}))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Nudging)])
def test_policies_are_read_or_refused(field: str) -> None:
    for make in VALUES.values():
        attempt(lambda make=make: Nudging(**{field: make()}))


NEEDED = {
    "prompt": PROMPT,
    "prompts": PROMPT,
    "messages": [{"role": "user", "content": "a"}],
    "continuation": [70],
    "role": "base",
    "token_ids": [60],
    "request_id": "nobody's",
    "listener": len,
}
OPTIONS = ("priority", "timeout", "cache_salt", "request_id")
CHAT_OPTIONS = (
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)
METHODS = [name for name in dir(LLM) if inspect.isfunction(getattr(LLM, name)) and not name.startswith("_")]
# These end the engine, and take no argument or one that `test_times_to_wait` gives.
ENDING = {"close", "drain"}


def arguments_of(method: str) -> list[str]:
    """Everything that a public method takes, options included."""
    parameters = inspect.signature(getattr(LLM, method)).parameters.values()
    named = [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named += OPTIONS + (CHAT_OPTIONS if "messages" in named else ())
    return named


CASES = [(name, argument) for name in METHODS if name not in ENDING for argument in arguments_of(name)]


def finish(result: Any) -> None:
    """Bring to its end whatever a method gave."""
    if hasattr(result, "cancel"):
        result.cancel()
    if hasattr(result, "close"):
        result.close()
    for handle in result if isinstance(result, list) else ():
        if hasattr(handle, "cancel"):
            handle.cancel()


@pytest.mark.parametrize(("method", "argument"), CASES)
def test_every_argument_is_served_or_refused(tiny_llm: LLM, method: str, argument: str) -> None:
    needed = {name: value for name, value in NEEDED.items() if name in arguments_of(method)[:4]}
    if "sampling_params" in arguments_of(method):
        needed["sampling_params"] = QUICK
    if method != "abort":
        needed.pop("request_id", None)
    for make in VALUES.values():
        given = needed | {argument: make()}
        finish(attempt(lambda given=given: getattr(tiny_llm, method)(**given)))
    assert tiny_llm.is_alive
    one(tiny_llm, max_tokens=1)


def test_what_asks_in_vain_costs_nobody_anything(tiny_llm: LLM) -> None:
    assert written(one(tiny_llm, max_tokens=4)) == written(one(tiny_llm, max_tokens=4))
    assert_pools_are_whole(tiny_llm)


@pytest.mark.parametrize("argument", ["sampling_params", "text", "length", "continuation"])
def test_open_texts_serve_or_refuse(tiny_llm: LLM, argument: str) -> None:
    for make in VALUES.values():
        with tiny_llm.open(PROMPT) as text:
            use = {"length": text.rewind, "continuation": text.score}.get(argument, text.extend)
            attempt(lambda use=use, make=make: use(**{argument: make()}))


def test_times_to_wait(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="1MiB") as llm:
        handle = llm.submit(PROMPT, QUICK)
        handle.result()
        for make in VALUES.values():
            attempt(lambda make=make: handle.result(timeout=make()))
            attempt(lambda make=make: llm.drain(timeout=make()))


@pytest.mark.parametrize(
    ("index", "seen"), [(10**30, 0), (-1, 0), (1, 0), (0, 10**30), (0, -1), (0, 4), (0, True)]
)
def test_a_delta_that_cannot_be_is_refused_by_its_limit(tiny_llm: LLM, index: int, seen: int) -> None:
    handle = tiny_llm.submit(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
    handle.result()
    name, value, limit = ("seen", seen, 3) if index == 0 else ("index", index, 0)
    with pytest.raises(
        BadRequest, match=f"{name} is {value}; it must be a whole number from 0 to {limit}, the"
    ):
        handle.take(index, seen)


def test_what_a_handle_is_asked_is_served_or_refused(tiny_llm: LLM) -> None:
    handle = tiny_llm.submit(PROMPT, QUICK)
    handle.result()
    for make in VALUES.values():
        attempt(lambda make=make: handle.take(make(), 0))
        attempt(lambda make=make: handle.take(0, make()))
        if not callable(make()):
            attempt(lambda make=make: handle.add_listener(make()))
    with pytest.raises(BadRequest, match="listener is 5; give a callable"):
        handle.add_listener(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["", ".", "nowhere/trace.json", "half \ud800"])
def test_a_trace_goes_into_a_file_that_can_be_made(place: str, tmp_path: Path) -> None:
    path = str(tmp_path / place) if place in (".", "nowhere/trace.json") else place
    with pytest.raises(BadRequest, match="trace is "):
        LLM.pocket(threads=1, trace=path)


@pytest.mark.parametrize("option", ["base", "guide", *LLMOptions.__annotations__])
def test_an_engine_is_opened_or_refused(tiny_pair: dict[str, Path], option: str, tmp_path: Path) -> None:
    for name, make in VALUES.items():
        if option == "trace" and name in ("str", "path"):
            continue  # a file's name, or none, as the system says
        given = {"base": tiny_pair["base"], "kv_cache_memory": "1MiB", "progress": False} | {option: make()}
        llm = attempt(lambda given=given: LLM(**given))
        if llm is not None:
            llm.close()


def test_none_is_the_default_wherever_it_may_be_passed(tiny_llm: LLM) -> None:
    options = {"speculate": None, "priority": None, "timeout": None, "cache_salt": None, "request_id": None}
    plain = written(tiny_llm.generate(PROMPT)[0].outputs[0])
    assert written(tiny_llm.generate(PROMPT, None, None, **options)[0].outputs[0]) == plain
    assert SamplingParams(stop=None, stop_token_ids=None, top_p=None, n=None) == SamplingParams()
    assert Nudging(None, None, None) == Nudging()


def test_numpy_and_torch_values_are_those_they_hold(tiny_llm: LLM) -> None:
    assert SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3)) == SamplingParams(3, 0.5)
    assert SamplingParams(stop_token_ids=np.array([1, 2])) == SamplingParams(stop_token_ids=(1, 2))
    assert Nudging(np.float64(0.25)) == Nudging(0.25)
    ids = [60, 61, 62]
    want = written(one(tiny_llm, ids))
    for prompt in (np.array(ids), torch.tensor(ids), [np.int64(i) for i in ids], range(60, 63), iter(ids)):
        assert written(tiny_llm.generate(prompt)[0].outputs[0]) == want
    rows = tiny_llm.generate(np.array([ids, ids]), QUICK)
    assert len(rows) == 2
    for prompt in (iter(ids), np.array(ids)):
        assert written(tiny_llm.submit(prompt, speculate=np.int64(0)).result().outputs[0]) == want
    with tiny_llm.open(np.array(ids)) as text:
        text.extend(text=torch.tensor([70, 71]))
        text.rewind(np.int64(1))
        assert text.token_ids == [70]
    assert np.array_equal(tiny_llm.logits("base", np.array(ids)), tiny_llm.logits("base", ids))
    assert tiny_llm.score(np.array(ids), torch.tensor([70])) == tiny_llm.score(ids, [70])


def test_prompts_may_come_from_anything_that_is_read_once(tiny_llm: LLM) -> None:
    texts = ["one", "two", "three"]
    want = [written(r.outputs[0]) for r in tiny_llm.generate(texts)]
    for prompts in (iter(texts), (text for text in texts), dict.fromkeys(texts).keys(), np.array(texts)):
        assert [written(r.outputs[0]) for r in tiny_llm.generate(list(prompts))] == want
    found = tiny_llm.generate((text for text in texts), (QUICK for _ in texts), iter([Base()] * 3))
    assert [len(result.outputs[0].token_ids) for result in found] == [1, 1, 1]
    named = [{"prompt": "one"}, {"prompt_token_ids": [60]}, {"prompt": {"base": "a", "guide": "b"}}]
    assert written(tiny_llm.generate(named)[0].outputs[0]) == want[0]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda llm: llm.generate("a", policy="base"), r"policy is 'base'; .*Base\(\)"),
        (lambda llm: llm.generate("a", policy=Base), r"policy is the class Base; give .*, Base\(\)"),
        (lambda llm: llm.generate("a", policy=5), "policy is 5, which has no roles"),
        (lambda llm: llm.generate("a", {"max_tokens": 3}), r"sampling_params is {.*; give SamplingParams"),
        (lambda llm: llm.generate(None), "prompts is None; give one prompt or a list of them"),
        (lambda llm: llm.generate({"a", "b"}), "prompts is a set"),
        (lambda llm: llm.score("q", None), "continuation is None; give text, token ids"),
        (lambda llm: llm.open("a").extend("hello"), r"sampling_params is 'hello'; .*extend\(text=...\)"),
        (lambda llm: llm.open("a").extend(QUICK, text="b"), "call extend once for each"),
        (
            lambda llm: llm.generate({"base": "a", "gide": "b"}),
            r"the prompt names the role 'gide' \(did you mean 'guide'\?\); open are base, guide",
        ),
        (lambda llm: llm.generate({"prompt": "a", "lora": 1}), "nothing beside it"),
        (lambda llm: LLM(None), "the checkpoint of 'base' is None; give a directory, a hub id"),
        (lambda llm: LLM(model="gpt2"), r"LLM has no option 'model' \(did you mean 'base'\?\)"),
        (lambda llm: LLM(), "LLM: missing a required argument: 'base'"),
        (lambda llm: LLM("pocket:base", max_model_len=5), r"'max_model_len' \(did you mean 'max_len'\?\)"),
        (lambda llm: SamplingParams(max_new_tokens=5), r"'max_new_tokens' \(did you mean 'max_tokens'\?\)"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    tiny_llm: LLM, use: Callable[[LLM], object], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        use(tiny_llm)


def test_a_missing_roles_remedy_is_an_option_that_there_is(tiny_llm: LLM) -> None:
    @dataclasses.dataclass(frozen=True)
    class Tuned(Base):
        roles = ("base", "guide-base")

    with pytest.raises(BadRequest, match=r"open the LLM with models=\{'guide-base': \.\.\.\}"):
        tiny_llm.generate("a", policy=Tuned())


def test_the_async_doors_refuse_alike() -> None:
    async def use() -> None:
        async with AsyncLLM.pocket() as llm:
            for prompts in (None, {"a"}, b"a", [1.5]):
                with pytest.raises(BadRequest):
                    await llm.generate(prompts)
            with pytest.raises(BadRequest):
                await llm.score("q", None)

    asyncio.run(use())
    with pytest.raises(BadRequest, match="AsyncLLM has no option 'thread'"):
        AsyncLLM("pocket:base", thread=1)
