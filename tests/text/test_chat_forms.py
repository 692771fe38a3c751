"""What a chat template may be given is what transformers gives it: parts, tools, thinking, open messages."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers

from nudging.errors import BadRequest
from nudging.text.chat_template import ChatTemplate, load_chat_template, plain_chat_template
from tests.text.test_chat import BRACKETS, CHATML, TOOLS, TURNS, write_tokenizer

# Each family's way of reading a message, in a few lines: by parts or as a text, by which names, in macros.
PARTS = """\
{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}
{%- else %}{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>
{%- elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""
PARTS_ONLY = """\
{% for message in messages %}{{ message.role | capitalize }}:
{%- for line in message['content'] if line.type == 'text' %} {{ line['text'] }}{% endfor %}<end>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
MACRO = """\
{%- macro written(content, is_system=false) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content -%}{%- if 'text' in part -%}{{ part.text }}{%- endif -%}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ written(m.content, m.role == 'system') }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
ASSIGNED = """\
{%- for message in messages -%}
{%- set text = message.content -%}
{%- if text is not string -%}{%- set text = text | map(attribute='text') | join('|') -%}{%- endif -%}
[{{ message.role }}]{{ text }}
{% endfor -%}{%- if add_generation_prompt -%}[assistant]{%- endif -%}"""
NUMBERED = """\
{%- if messages[0].role == 'system' -%}
{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}
{% set messages = messages[1:] -%}{%- endif -%}
{%- for m in messages -%}<{{ m.role }}>{{ m.content[0]['text'] if m.content is not string else m.content }}
{% endfor -%}"""
THINKING = """\
{%- for message in messages -%}
{%- set content = message.content if message.content is defined else '' -%}
{%- if message.role == 'assistant' and message.reasoning_content is defined and not loop.last -%}
<|im_start|>assistant
<think>
{{ message.reasoning_content.strip('\\n') }}
</think>

{{ content.lstrip('\\n') }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{% if message.reasoning_content is defined -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}
{{ content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}<think>

</think>

{% endif -%}{%- endif -%}"""
CALLS = """\
{{- bos_token }}
{%- if documents is not none and documents is defined %}{% for d in documents %}
{{ loop.index0 }}. {{ d.title }}: {{ d['text'] }}{% endfor %}{% endif %}
{%- if tools is not none %}{{ 'Tools: ' ~ tools | tojson(indent=4) ~ '\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' or message.role == 'ipython' %}
<result>{{ message.content | tojson if message.content is mapping or message.content is iterable and message.content is not string else message.content }}</result>
{%- elif message.tool_calls is defined and message.tool_calls %}
{%- for call in message.tool_calls %}
<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}
{%- elif message.role == 'judge' %}
JUDGE {{ message.name | default('nobody') }}: {{ message.content }}
{%- elif message.role in ('user', 'assistant', 'system') %}
{{ message.role }}: {{ message.content | trim }}{{ eos_token if message.role == 'assistant' else '' }}
{%- else %}{{ raise_exception('no turns of ' + message.role) }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}
assistant: {% endif %}"""  # noqa: E501
TEMPLATES = {
    "parts": PARTS,
    "macro": MACRO,
    "assigned": ASSIGNED,
    "numbered": NUMBERED,
    "thinking": THINKING,
    "calls": CALLS,
    "chatml": CHATML,
    "brackets": BRACKETS,
    "turns": TURNS,
}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "\u00e9<"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  hello {{ 1 }}\n"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "hello"}],
    "turns": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "5 "},
        {"role": "user", "content": "And 4?"},
    ],
    "open": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "The sum is "}],
    "reasoning": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "5", "reasoning": "Two and\nthree"},
        {"role": "user", "content": "And 4?"},
        {"role": "assistant", "content": "<think>x</think>\n\n6", "thinking": "four"},
    ],
    "nulls": [
        {"role": "user", "content": "2 + 3?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": {"sum": 5}, "name": "add"},
        {"role": "tool", "content": "5", "tool_calls": None},
        {"role": "user", "content": "Well?"},
    ],
    "judge": [{"role": "user", "content": "x"}, {"role": "judge", "content": "guilty", "name": "Ann"}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"add_generation_prompt": False},
    "prompt": {"add_generation_prompt": True},
    "open": {"continue_final_message": True},
    "open, by name": {"continue_final_message": "content"},
    "open thought": {"continue_final_message": "thinking"},
    "tools": {"tools": TOOLS, "add_generation_prompt": True},
    "no tools": {"tools": [], "add_generation_prompt": True},
    "documents": {"documents": [{"title": "A", "text": "b"}], "add_generation_prompt": True},
    "no thinking": {"enable_thinking": False, "add_generation_prompt": True},
    "another BOS": {"bos_token": "<other>", "add_generation_prompt": True},
}


@pytest.fixture(scope="module", params=list(TEMPLATES))
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ChatTemplate, transformers.PreTrainedTokenizerFast]:
    """A template here and in transformers."""
    directory = tmp_path_factory.mktemp(request.param)
    hf = write_tokenizer(directory, chat_template=TEMPLATES[request.param])
    template = load_chat_template(directory)
    assert template is not None
    return template, hf


def rendered(template: ChatTemplate, chat: Any, options: dict[str, Any]) -> str | None:
    """The prompt, None where it is refused."""
    try:
        return template.render(chat, **options)
    except BadRequest:
        return None


def expected(hf: transformers.PreTrainedTokenizerFast, chat: Any, options: dict[str, Any]) -> str | None:
    """The same of transformers."""
    try:
        return str(hf.apply_chat_template(chat, tokenize=False, **options))
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError):
        return None


@pytest.mark.parametrize("chat", list(CHATS))
def test_every_argument_of_transformers_does_the_same(
    both: tuple[ChatTemplate, transformers.PreTrainedTokenizerFast], chat: str
) -> None:
    template, hf = both
    for name, options in OPTIONS.items():
        assert rendered(template, CHATS[chat], options) == expected(hf, CHATS[chat], options), name


WALKING = ("parts", "macro", "assigned", "numbered")


@pytest.mark.parametrize("name", WALKING)
def test_a_template_that_walks_through_parts_gets_them(tmp_path: Path, name: str) -> None:
    hf = write_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    template = load_chat_template(tmp_path)
    assert template is not None
    chat = [
        {"role": "system", "content": parts("Be brief.")},
        {"role": "user", "content": parts(" hello ", "there")},
        {"role": "assistant", "content": parts("a", "b ")},
    ]
    for messages, options in product((chat, chat[:2], chat[1:2]), (OPTIONS["none"], OPTIONS["prompt"])):
        assert template.render(messages, **options) == expected(hf, messages, options)
    assert rendered(template, chat, OPTIONS["open"]) == expected(hf, chat, OPTIONS["open"])
    assert "hello" in template.render(chat[1:2])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in WALKING])
def test_a_template_that_reads_a_text_gets_the_parts_as_one(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    in_parts = [{"role": "user", "content": parts("hel", "lo")}]
    assert template.render(in_parts) == template.render([{"role": "user", "content": "hello"}])
    assert "hello" in template.render(in_parts)


def test_a_text_does_not_vanish_in_a_template_that_only_walks(tmp_path: Path) -> None:
    hf = write_tokenizer(tmp_path, chat_template=PARTS_ONLY)
    template = ChatTemplate(PARTS_ONLY)
    for content in ("hello", parts("hello")):
        prompt = template.render([{"role": "user", "content": content}])
        assert prompt == expected(hf, [{"role": "user", "content": parts("hello")}], OPTIONS["prompt"])
        assert "hello" in prompt


def test_an_open_message_ends_where_it_ends() -> None:
    chat = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "It is"}]
    assert ChatTemplate(CHATML).render(chat, continue_final_message=True).endswith("assistant\nIt is")
    plain = plain_chat_template().render(chat, continue_final_message=True)
    assert plain == "Question: 2+3?\nAnswer: It is"
    assert chat[-1] == {"role": "assistant", "content": "It is"}, "the caller's messages stay"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "both set"),
        ({"continue_final_message": "reasoning_content"}, "no text in|no such field"),
        ({"continue_final_message": "title"}, "no such field"),
        ({"tools": "add"}, "list of JSON schemas"),
        ({"tools": [len]}, "get_json_schema"),
        ({"tools": [3]}, "list of JSON schemas"),
        ({"documents": {"title": "x"}}, "list of objects"),
        ({"chat_template": "{% for %}"}, "not valid Jinja"),
        ({"chat_template": 3}, "Jinja source"),
        ({"chat_template": "chat.jinja"}, r"none of the checkpoint's templates \['default'\].*not its file"),
        ({"chat_template": "{{ nothing.at.all }}"}, "fails on these messages"),
    ],
)
def test_arguments_that_are_none_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        ChatTemplate(CHATML).render(CHATS["turns"], **options)


def test_a_template_that_drops_the_open_message_is_refused() -> None:
    with pytest.raises(BadRequest, match="does not write 'The sum is '"):
        ChatTemplate("{{ messages[0].content }}{# content #}").render(
            CHATS["open"], continue_final_message=True
        )


def test_another_template_may_be_given_by_source_or_by_name() -> None:
    template = ChatTemplate({"default": "a", "rag": "{{ bos_token }}r"}, {"bos_token": "<s>"})
    assert template.render(CHATS["one"]) == "a"
    assert template.render(CHATS["one"], chat_template="rag") == "<s>r"
    assert template.render(CHATS["one"], chat_template="{{ bos_token }}x") == "<s>x"


def test_a_given_template_is_compiled_once_for_many_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    template, sources = ChatTemplate("a"), []
    compiled = ChatTemplate._compile

    def count(self: ChatTemplate, source: str) -> Any:
        sources.append(source)
        return compiled(self, source)

    monkeypatch.setattr(ChatTemplate, "_compile", count)
    for letter in "xxxyy":
        assert template.render(CHATS["one"], chat_template=f"{{{{ '{letter}' }}}}") == letter
    assert sources == ["{{ 'x' }}", "{{ 'y' }}"]


def test_what_is_nested_without_end_is_refused() -> None:
    endless: dict[str, Any] = {"role": "user", "content": "x"}
    endless["self"] = endless
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for messages, options in (
        ([endless], {}),
        ([{**CHATS["one"][0], "extra": deep}], {}),
        (CHATS["one"], {"x": deep}),
    ):
        with pytest.raises(BadRequest, match="nested more than 100 deep"):
            ChatTemplate(CHATML).render(messages, **options)


def test_no_parts_are_no_text() -> None:
    assert "user\n<|im_end|>" in ChatTemplate(CHATML).render([{"role": "user", "content": []}])


def test_messages_may_be_objects() -> None:
    @dataclasses.dataclass
    class Said:
        role: str
        content: str
        name: str | None = None

    class Dumped:
        def model_dump(self) -> dict[str, Any]:
            return {"role": "user", "content": "hello", "refusal": None}

    want = ChatTemplate(CHATML).render([{"role": "user", "content": "hello"}])
    assert ChatTemplate(CHATML).render([Said("user", "hello")]) == want  # type: ignore[list-item]
    assert ChatTemplate(CHATML).render([Dumped()]) == want  # type: ignore[list-item]
