"""Chats become prompts by the template that came with a checkpoint, or by a plain form for base models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, TemplateSyntaxError

from nudging.errors import BadRequest, CheckpointError
from nudging.files.lfs import refuse_pointer
from nudging.text.chat_content import ContentForm, content_form
from nudging.text.chat_messages import (
    REASONING,
    Message,
    check_messages,
    check_objects,
    cut_open,
    fitted,
    left_open,
    plain,
)
from nudging.text.special_tokens import named_special_tokens, read_json
from nudging.text.template_sandbox import ChatEnvironment
from nudging.text.tokenizer import Tokenizer

# What a base model was never taught it can still read: questions and answers, the last one open.
PLAIN = """\
{%- for message in messages -%}
    {%- if message.role in ("system", "developer") -%}
        {{- message.content | trim ~ "\n\n" -}}
    {%- elif message.role == "user" -%}
        {{- "Question: " ~ message.content | trim ~ "\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- "Answer: " ~ message.content | trim ~ "\n" -}}
    {%- else -%}
        {{- raise_exception("the plain form has no turns of the role " ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Answer:" -}}
{%- endif -%}
"""

PLAIN_FORM = 'none; chats are written as "Question: ..." and "Answer: ..."'

# What a template may stumble over in messages it was not made for; all of it is the caller's to mend.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _Compiled(NamedTuple):
    template: Template
    source: str
    form: ContentForm


class ChatTemplate:
    """One model's way of writing a chat as a prompt."""

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str | list[str]] | None = None,
        *,
        needs_special_tokens: bool = False,
        form: str = "its own",
    ) -> None:
        """`templates`: the source, or several by name: "default", and "tool_use" for chats with tools.

        `special_tokens`: variables of the template (`bos_token` ...).  `needs_special_tokens`: the template
        leaves it to the tokenizer to put BOS in front.  `form`: what it is, in words.  CheckpointError: a
        template is not valid Jinja.
        """
        sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.needs_special_tokens = needs_special_tokens
        self.form = form
        self._special_tokens = dict(special_tokens or {})
        self._environment = ChatEnvironment()
        self._last_given: _Compiled | None = None  # a caller's: thousands of chats may come with one
        try:
            self._templates = {name: self._compile(source) for name, source in sources.items()}
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid Jinja: {error.message} (line {error.lineno}); "
                "mend chat_template in the checkpoint or pass text prompts"
            ) from error

    @property
    def sources(self) -> dict[str, str]:
        """The Jinja source of each template by its name."""
        return {name: compiled.source for name, compiled in self._templates.items()}

    def replaced(self, template: str) -> ChatTemplate:
        """The same special tokens with another template: a Jinja source, or the name of one of these.

        BadRequest: not valid Jinja.
        """
        source = self.sources.get(template, template)
        self._given(template)
        return ChatTemplate(source, self._special_tokens, form="given by the caller")

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a chat, as transformers' `apply_chat_template` writes it.

        A message has a `role` and `content`, text or a list of {"type": "text", "text": ...}, and whatever
        else the template reads (`tool_calls`, `reasoning_content` ...).  `add_generation_prompt`: end where
        the assistant's next turn begins; True unless `continue_final_message`.  `continue_final_message`: end
        within the last message, which goes on; a str names the field to go on with, else "content".  `tools`:
        JSON schemas; `documents`: objects with title and text.  `chat_template`: another template, or the
        name of one of the checkpoint's.  `variables`: plain JSON values for the template (`enable_thinking`
        ...).  BadRequest: messages that are malformed or that the template refuses, or a runaway template.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif continue_final_message and add_generation_prompt:
            raise BadRequest(
                "continue_final_message and add_generation_prompt are both set: a prompt ends within the "
                "last message or where the next one begins; leave one of them"
            )
        given = self._special_tokens | plain(variables, "variables")
        given |= {
            "tools": check_objects(tools, "tools", "JSON schemas"),
            "documents": check_objects(documents, "documents", "objects with title and text"),
            "add_generation_prompt": add_generation_prompt,
        }
        chosen = self._choose(chat_template, given["tools"] is not None)
        chat, text = check_messages(messages), None
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            _check_field(field, chosen.source)
            chat, text = left_open(chat, field)
        rendered = self._write(chosen, given | {"messages": [fitted(m, *chosen.form) for m in chat]})
        return rendered if text is None else cut_open(rendered, text)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        **variables: Any,
    ) -> list[int]:
        """The prompt's token ids; the template's special tokens are read as such, none are added twice."""
        text = self.render(messages, add_generation_prompt, **variables)
        return tokenizer.encode(text, special=self.needs_special_tokens)

    def _write(self, chosen: _Compiled, given: dict[str, Any]) -> str:
        try:
            return self._environment.write(chosen.template, given)
        except _RENDER_ERRORS as error:
            raise BadRequest(
                f"the model's chat template fails on these messages: {error}; change them or send text"
            ) from error

    def _choose(self, chat_template: str | None, has_tools: bool) -> _Compiled:
        if chat_template is not None:
            return self._given(chat_template)
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise BadRequest(
                f"the checkpoint's chat templates are {sorted(self._templates)}, none is {name!r}; name one "
                "by chat_template"
            )
        return self._templates[name]

    def _given(self, chat_template: object) -> _Compiled:
        """A caller's template."""
        if not isinstance(chat_template, str):
            raise BadRequest(
                f"chat_template is {chat_template!r:.80}; give a Jinja source or a template's name"
            )
        if chat_template in self._templates:
            return self._templates[chat_template]
        if "{{" not in chat_template and "{%" not in chat_template:
            raise BadRequest(
                f"chat_template is {chat_template!r:.80}, which is no Jinja source and none of the "
                f"checkpoint's templates {sorted(self._templates)}; give the text of a template, not its file"
            )
        last = self._last_given
        if last is not None and last.source == chat_template:
            return last
        try:
            self._last_given = found = self._compile(chat_template)
            return found
        except TemplateSyntaxError as error:
            raise BadRequest(
                f"chat_template is not valid Jinja: {error.message} (line {error.lineno}); the checkpoint's "
                f"own have the names {sorted(self._templates)}"
            ) from error

    def _compile(self, source: str) -> _Compiled:
        tree = self._environment.parse(source)
        return _Compiled(self._environment.from_string(source), source, content_form(tree))


def _check_field(field: str, source: str) -> None:
    """BadRequest where the template never reads the field that is to go on."""
    names = REASONING if field in REASONING else (field,)
    if not any(name in source for name in names):
        raise BadRequest(
            f"continue_final_message is {field!r} and the chat template reads no such field; name another one"
        )


def plain_chat_template() -> ChatTemplate:
    """The form for models without a template: system text, then "Question: ..." and "Answer: ..." in turn."""
    return ChatTemplate(PLAIN, needs_special_tokens=True, form=PLAIN_FORM)


def load_chat_template(path: str | Path) -> ChatTemplate | None:
    """The chat template of a checkpoint directory, None where it has none.

    Looked for in chat_template.jinja (with additional_chat_templates/), tokenizer_config.json and
    chat_template.json, in this order.  CheckpointError: it is there but of no use.
    """
    folder = Path(path)
    found: object = None
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja"}
        files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        found = {name: _read_text(file) for name, file in files.items()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if found is None:
            found = read_json(folder / name).get("chat_template")
    if found is None:
        return None
    return ChatTemplate(_by_name(found, folder), named_special_tokens(folder))


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    refuse_pointer(data[:64], file)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 ({error}); fetch it again") from error


def _by_name(found: object, folder: Path) -> dict[str, str]:
    """Templates by name from any of the notations: one text, a list of named ones, an object."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {item.get("name"): item.get("template") for item in found}
    if isinstance(found, dict) and all(isinstance(text, str) for item in found.items() for text in item):
        return found
    raise CheckpointError(f"{folder}: chat_template is neither text nor a list of named templates; mend it")
