"""Chats render as transformers renders them; messages and templates that cannot be are refused."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from nudging.errors import BadRequest, CheckpointError
from nudging.text import template_sandbox as chat_sandbox
from nudging.text.chat_template import ChatTemplate, load_chat_template, plain_chat_template
from nudging.text.loading import load_tokenizer
from nudging.text.template_sandbox import WORK_LIMIT, Meter

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' ~ call.function.name ~ ' ' ~ call.function.arguments | tojson(indent=2) }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}
    {{- message.content + '<|im_end|>\\n' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

BRACKETS = """\
{% if messages[0]['role'] == 'system' %}
  {% set loop_messages = messages[1:] %}
  {% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% else %}
  {% set loop_messages, system = messages, '' %}
{% endif %}
{% for message in loop_messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
  {% else %}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
  {% endif %}
{% endfor %}
"""

TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set ns = namespace(turns=0, last='') -%}
{% macro turn(role, text) -%}
<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro -%}
{% for message in messages if message.role in ['user', 'assistant'] -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- set ns.last = message.role -%}
    {{ turn('model' if message.role == 'assistant' else message.role, message['content']) }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}{# a comment #}
{%- if ns.turns > 1 %} {{ ns.turns }} {{ ns.last | upper }} {% endif %}
{{ messages | map(attribute='role') | join('|') }}
{%- for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i * 2 ~ '-' * i }}{% endfor %}
{{- pad_token is defined }} {{ undefined_thing }} {{ {'a': '<&>\\u00e9'} | tojson }}
"""

USER = {"role": "user", "content": "  What is <2 & 3>?\n"}
ANSWER = {"role": "assistant", "content": "\u4e94 \U0001f600 is\tit. "}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": "\u00e9<"}}}
CHATS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, {"role": "user", "content": "And {{ 1 + 1 }}?"}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds \u00e9 & <b>."}}]


def write_tokenizer(folder: Path, **config: Any) -> transformers.PreTrainedTokenizerFast:
    """A checkpoint's tokenizer files as transformers writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    cutter = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    cutter.add_special_tokens(["<s>", "</s>"])
    cutter.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=cutter, bos_token="<s>", eos_token="</s>", **config
    )
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("source", [CHATML, BRACKETS, TURNS], ids=["chatml", "brackets", "turns"])
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS, "enable_thinking": False}], ids=["bare", "tools"])
def test_chats_render_and_encode_as_in_transformers(
    tmp_path: Path, source: str, variables: dict[str, Any]
) -> None:
    hf = write_tokenizer(tmp_path, chat_template=source)
    template, tokenizer = load_chat_template(tmp_path), load_tokenizer(tmp_path)
    assert template is not None
    assert tokenizer is not None
    for chat in CHATS:
        for prompt in (True, False):
            given = variables | {"add_generation_prompt": prompt}
            try:
                expected = hf.apply_chat_template(chat, tokenize=False, **given)
            except jinja2.TemplateError as error:
                with pytest.raises(BadRequest, match=re.escape(str(error))):
                    template.render(chat, **given)
                continue
            assert template.render(chat, **given) == expected
            ids = hf.apply_chat_template(chat, tokenize=True, return_dict=False, **given)
            assert template.encode(tokenizer, chat, **given) == ids


def test_the_day_can_be_told() -> None:
    with mock.patch.object(chat_sandbox, "datetime") as module:
        module.datetime.now.return_value = datetime.datetime(2026, 2, 3)
        assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([USER]) == "03 Feb 2026"


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old {{ eos_token }}"}))
    config: dict[str, Any] = {"eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered(tmp_path) == "old </s>"
    named = [{"name": "default", "template": "chat"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert rendered(tmp_path) == "chat"
    assert rendered(tmp_path, tools=TOOLS) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert rendered(tmp_path, tools=TOOLS) == "file </s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file with tools")
    assert rendered(tmp_path, tools=TOOLS) == "file with tools"


def rendered(folder: Path, **variables: Any) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.render([USER], **variables)


@pytest.mark.parametrize("found", ["{% for %}", "{{ a ", "{% nothing %}", 3, ["a"], [{"name": "default"}]])
def test_templates_that_are_none_are_refused(tmp_path: Path, found: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(CheckpointError, match="chat_template|chat template"):
        load_chat_template(tmp_path)


def test_named_templates_without_a_default_are_refused_by_name() -> None:
    with pytest.raises(BadRequest, match=r"\['rag'\], none is 'default'"):
        ChatTemplate({"rag": "x"}).render([USER])


def test_the_plain_form_is_questions_and_answers() -> None:
    render = plain_chat_template().render
    assert render([{"role": "user", "content": "How old is Ada?"}]) == "Question: How old is Ada?\nAnswer:"
    chat = [SYSTEM, {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": " 5\n"}]
    assert render(chat, add_generation_prompt=False) == "Be brief.\n\nQuestion: 2+3?\nAnswer: 5\n"
    assert render([*chat, USER]).endswith("Answer: 5\nQuestion: What is <2 & 3>?\nAnswer:")
    with pytest.raises(BadRequest, match="no turns of the role tool"):
        render([USER, {"role": "tool", "content": "5"}])


def test_the_plain_form_leaves_special_tokens_to_the_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert plain_chat_template().encode(tokenizer, [USER])[0] == tokenizer.bos_id
    assert ChatTemplate("{{ messages[0].content }}").encode(tokenizer, [USER])[0] != tokenizer.bos_id


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "+3?"}]
    render = plain_chat_template().render
    assert render([{"role": "user", "content": parts}]) == render([{"role": "user", "content": "2+3?"}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("Hi", "at least one message"),
        (["Hi"], "message 0 is 'Hi'"),
        (
            [USER, {"role": "robot", "content": "x"}],
            "no turns of the role robot",
        ),
        ([{"content": "x"}], "role None"),
        ([{"role": "user"}], "content None"),
        ([{"role": "user", "content": 5}], "content 5"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "part.*image"),
        ([{"role": "user", "content": "x", "file": object()}], "holds a object"),
    ],
)
def test_malformed_messages_are_refused_by_place_and_reason(messages: Any, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        plain_chat_template().render(messages)


def test_variables_must_be_plain_values() -> None:
    with pytest.raises(BadRequest, match="holds a PosixPath|holds a WindowsPath"):
        plain_chat_template().render([USER], folder=Path())


DOUBLING = "{% set n = namespace(s='a') %}{% for i in range(99) %}"
RUNAWAYS: dict[str, str] = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{{ range(10 ** 9) | list }}",
    "doubling by ~": DOUBLING + "{% set n.s = n.s ~ 1 ~ n.s %}{% endfor %}",
    "doubling by +": DOUBLING + "{% set n.s = n.s + n.s %}{% endfor %}",
    "a product": "{{ 10 ** 12 * 'a' }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "output": "{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("source", RUNAWAYS.values(), ids=list(RUNAWAYS))
def test_runaway_templates_are_stopped_soon(source: str) -> None:
    """What is counted is work: no more blocks and operators than the budget has room for."""
    spent: list[int] = []
    spend = Meter.spend

    def counted(meter: Meter, cost: int) -> None:
        spent.append(cost)
        spend(meter, cost)

    with (
        mock.patch.object(Meter, "spend", counted),
        pytest.raises(BadRequest, match="limit|Range too big|recursion"),
    ):
        ChatTemplate(source).render([USER])
    assert sum(spent[:-1]) <= WORK_LIMIT
    assert len(spent) <= 2**21, "each is work of microseconds"


def test_long_chats_are_within_the_limits() -> None:
    chat = [SYSTEM, *[{"role": "user", "content": "word " * 100}, ANSWER] * 2000]
    assert len(ChatTemplate(CHATML).render(chat)) > 1_000_000


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{% include 'file' %}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_templates_reach_nothing_but_their_variables(source: str) -> None:
    render: Callable[..., str] = ChatTemplate(source).render
    chat = [dict(USER)]
    with pytest.raises(BadRequest):
        render(chat)
    assert chat == [USER]
