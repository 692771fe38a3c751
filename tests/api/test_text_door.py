"""Where text becomes ids: tokens the model lacks are refused at the door, chats are written as asked."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudging import LLM, AsyncLLM, BadRequest, Base, SamplingParams
from nudging.text.chat_template import PLAIN_FORM
from nudging.text.tokenizer import Tokenizer
from tests.support.tiny import write_tiny_checkpoint
from tests.text.test_chat import CHATML

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)
USER = {"role": "user", "content": "How many?"}
OPEN = [USER, {"role": "assistant", "content": "There are"}]


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 320 ids with a tokenizer of 323: 320 is text, 321 is special, 322 only looks like a word."""
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("beyond"), eos=(1,))
    spec = json.loads((path / "tokenizer.json").read_text())
    size = max(spec["model"]["vocab"].values()) + 1
    assert size <= 320
    for i, (text, special) in enumerate((("<tool>", False), ("<pad>", True), ("zebra", False))):
        spec["added_tokens"].append(
            {
                "id": 320 + i,
                "content": text,
                "special": special,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
            }
        )
        spec["model"]["vocab"][text] = 320 + i
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return path


@pytest.fixture(scope="module")
def llm(beyond: Path) -> Iterator[LLM]:
    with (
        pytest.warns(UserWarning, match=r"'base' knows the ids 320 \('<tool>'\), 321 \('<pad>'\), 322"),
        LLM(base=beyond, kv_cache_memory="2MiB", threads=1) as llm,
    ):
        yield llm


REFUSED = {
    "generate": lambda llm, text: llm.generate(["a", text], PARAMS),
    "stream": lambda llm, text: list(llm.stream(text, PARAMS)),
    "submit": lambda llm, text: llm.submit(text, PARAMS),
    "dict": lambda llm, text: llm.generate({"base": text}, PARAMS),
    "chat": lambda llm, text: llm.chat([{"role": "user", "content": text}], PARAMS),
    "open": lambda llm, text: llm.open(text),
    "score": lambda llm, text: llm.score(text, "x"),
}


@pytest.mark.parametrize("way", list(REFUSED))
@pytest.mark.parametrize("text", ["a<pad>b", "<tool>", "a zebra"])
def test_a_token_that_the_embedding_lacks_is_refused_at_the_door(llm: LLM, way: str, text: str) -> None:
    with pytest.raises(BadRequest, match=r"whose id is 32[012].*320 rows, ids 0 to 319.*take it out"):
        REFUSED[way](llm, text)
    assert llm.generate("a", PARAMS)[0].outputs[0].finish_reason == "length", "the engine lives on"


def test_in_running_text_such_a_token_is_the_text_it_looks_like(llm: LLM) -> None:
    tokenizer = llm.roles["base"].tokenizer
    assert isinstance(tokenizer, Tokenizer)
    for text in ("a<pad>b", " <tool>", "a zebra"):
        ids = tokenizer.encode_continuation(text)
        assert tokenizer.bytes_of(ids) == text.encode()
        assert max(ids) < 320
        assert len(llm.score("a", text)) == len(ids)
        with llm.open("a", Base()) as generation:
            generation.extend(text=text)


def test_the_form_of_a_model_without_a_template_is_shown_and_can_be_set(beyond: Path, llm: LLM) -> None:
    template = llm.roles["base"].template
    assert template.form == PLAIN_FORM
    assert template.render([USER]) == "Question: How many?\nAnswer:"
    with pytest.warns(UserWarning, match="knows the ids"):
        set_ = LLM(base=beyond, kv_cache_memory="1MiB", threads=1, chat_template={"base": CHATML})
    with set_:
        assert set_.roles["base"].template.form == "given by the caller"
        assert set_.roles["base"].template.sources == {"default": CHATML}
        want = set_.generate(rendered([USER]), PARAMS)[0].outputs[0].token_ids
        assert set_.chat([USER], PARAMS)[0].outputs[0].token_ids == want


def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
    from nudging.text.chat_template import ChatTemplate

    return ChatTemplate(CHATML).render(messages, **options)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"tools": [{"name": "add"}]}, {"tools": [{"name": "add"}]}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"continue_final_message": True}}, {"continue_final_message": True}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"continue_final_message": "content"}, {"continue_final_message": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"add_generation_prompt": None, "tools": None, "documents": None, "chat_template_kwargs": None}, {}),
    ],
)
def test_a_chat_takes_the_arguments_of_its_template(
    llm: LLM, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    want = llm.generate(rendered(OPEN, **arguments), PARAMS)[0].outputs[0].token_ids
    options = {"chat_template": CHATML, **options}
    assert llm.chat(OPEN, PARAMS, **options)[0].outputs[0].token_ids == want
    assert llm.submit_chat(OPEN, PARAMS, **options).result().outputs[0].token_ids == want
    by_role = options | {"chat_template": {"base": CHATML}, "priority": 2}
    assert llm.chat([OPEN, OPEN], PARAMS, **by_role)[1].outputs[0].token_ids == want


def test_conversations_are_told_from_messages(llm: LLM) -> None:
    @dataclasses.dataclass
    class Said:
        role: str
        content: str

    want = llm.chat([USER], PARAMS)[0].outputs[0].token_ids
    said = Said("user", "How many?")
    for messages, count in (
        ([said], 1),
        ((USER,), 1),
        ([[USER], [said]], 2),
        (([USER], [USER]), 2),
        (iter([[USER], [USER], [USER]]), 3),
        (iter([USER]), 1),
    ):
        results = llm.chat(messages, PARAMS)  # type: ignore[arg-type]
        assert [result.outputs[0].token_ids for result in results] == [want] * count


@pytest.mark.parametrize("messages", [None, "Hi", [], 3, {}, USER, [[]], ["Hi"], [None], [[USER], None]])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(BadRequest, match="message"):
        llm.chat(messages, PARAMS)


def test_an_async_chat_takes_them_too(llm: LLM) -> None:
    want = llm.chat(OPEN, PARAMS, continue_final_message=True)[0].outputs[0].token_ids

    async def both() -> None:
        twin = AsyncLLM("nowhere")
        twin._llm = llm
        result = await twin.chat(OPEN, PARAMS, continue_final_message=True)
        assert result[0].outputs[0].token_ids == want
        handle = twin.submit_chat(OPEN, PARAMS, continue_final_message=True)
        assert (await handle.result()).outputs[0].token_ids == want

    asyncio.run(both())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_thinking": False}, "has no option 'enable_thinking'.*chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "must map names"),
        ({"chat_template_kwargs": {"tools": []}, "tools": []}, "tools stands in"),
        ({"chat_template_kwargs": {"messages": []}}, "first argument"),
        ({"add_generation_prompt": "yes"}, "True or False"),
        ({"continue_final_message": 1}, "True or False"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "both set"),
        ({"chat_template": {"guide": "x"}}, "names 'guide'"),
        ({"chat_template": {"base": 3}}, "Jinja source"),
        ({"tools": 3}, "list of JSON schemas"),
    ],
)
def test_arguments_that_cannot_be_are_refused(llm: LLM, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        llm.chat(OPEN, PARAMS, **options)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"expert": "x"}, "names the role 'expert'; the roles are base"),
        ({"base": 3}, "'base' is 3"),
        (3, "'base' is 3"),
        ("{% for %}", "not valid Jinja"),
        ("chat.jinja", "not its file"),
    ],
)
def test_a_template_that_is_none_is_refused_before_anything_loads(
    beyond: Path, given: Any, reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason):
        LLM(base=beyond, chat_template=given)


def test_what_keeps_two_vocabularies_apart_is_named(tmp_path: Path) -> None:
    """Two of one size differ in some token, or in how they merge; a count says neither."""
    base = write_tiny_checkpoint(tmp_path / "base")
    guide = write_tiny_checkpoint(tmp_path / "guide")
    spec = json.loads((guide / "tokenizer.json").read_text())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    names = {token: text for text, token in vocab.items()}
    vocab[names[300]], vocab[names[301]] = 301, 300
    (guide / "tokenizer.json").write_text(json.dumps(spec))
    assert refused(base, guide).startswith(f"id 300 is {text_of(names[300])!r} in the one and")
    vocab[names[300]], vocab[names[301]] = 300, 301
    spec["model"]["merges"] = [*merges[1:], merges[0]]
    (guide / "tokenizer.json").write_text(json.dumps(spec))
    assert refused(base, guide).startswith("their 320 tokens are the same and the merges that order them")


def text_of(name: str) -> str:
    return name.replace("\u0120", " ")


def refused(base: Path, guide: Path) -> str:
    """Why the two may not pass ids."""
    with LLM(base, guide, kv_cache_memory="4MiB") as llm, pytest.raises(BadRequest) as caught:
        llm.generate("a", PARAMS)
    before, _, reason = str(caught.value).partition("vocabularies differ: ")
    assert "'base' and 'guide'" in before
    return reason
