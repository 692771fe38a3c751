"""Chats become prompts by the template that came with a checkpoint, or by a plain form for base models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from nudging.chat_sandbox import ChatEnvironment
from nudging.errors import BadRequest, CheckpointError
from nudging.tokenizer import Tokenizer, named_special_tokens, read_json

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

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


class ChatTemplate:
    """One model's way of writing a chat as a prompt."""

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str | list[str]] | None = None,
        *,
        needs_special_tokens: bool = False,
    ) -> None:
        """`templates`: the source, or several by name: "default", and "tool_use" for chats with tools.

        `special_tokens`: variables of the template (`bos_token` ...).  `needs_special_tokens`: the template
        leaves it to the tokenizer to put BOS in front.  CheckpointError: a template is not valid Jinja.
        """
        sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.needs_special_tokens = needs_special_tokens
        self._special_tokens = dict(special_tokens or {})
        self._environment = ChatEnvironment()
        try:
            self._templates = {
                name: self._environment.from_string(source) for name, source in sources.items()
            }
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid Jinja: {error.message} (line {error.lineno}); "
                "mend chat_template in the checkpoint or pass text prompts"
            ) from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a chat; with `add_generation_prompt` it ends where the assistant's next turn begins.

        A message has a `role` (see ROLES) and `content`: text or a list of {"type": "text", "text": ...}.
        `variables` are plain JSON values that the template may use (`tools`, `enable_thinking` ...).
        BadRequest: messages that are malformed or that the template refuses, or a runaway template.
        """
        given = self._special_tokens | {"tools": None, "documents": None} | plain(variables, "variables")
        given |= {"messages": check_messages(messages), "add_generation_prompt": add_generation_prompt}
        name = "tool_use" if given["tools"] and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise BadRequest(
                f"the checkpoint's chat templates are {sorted(self._templates)}, none is {name!r}"
            )
        try:
            return self._environment.write(self._templates[name], given)
        except _RENDER_ERRORS as error:
            raise BadRequest(
                f"the model's chat template fails on these messages: {error}; change them or send text"
            ) from error

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The prompt's token ids; the template's special tokens are read as such, none are added twice."""
        text = self.render(messages, add_generation_prompt, **variables)
        return tokenizer.encode(text, special=self.needs_special_tokens)


def plain_chat_template() -> ChatTemplate:
    """The form for models without a template: system text, then "Question: ..." and "Answer: ..." in turn."""
    return ChatTemplate(PLAIN, needs_special_tokens=True)


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
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if found is None:
            found = read_json(folder / name).get("chat_template")
    if found is None:
        return None
    return ChatTemplate(_by_name(found, folder), named_special_tokens(folder))


def _by_name(found: object, folder: Path) -> dict[str, str]:
    """Templates by name from any of the notations: one text, a list of named ones, an object."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {item.get("name"): item.get("template") for item in found}
    if isinstance(found, dict) and all(isinstance(text, str) for item in found.items() for text in item):
        return found
    raise CheckpointError(f"{folder}: chat_template is neither text nor a list of named templates; mend it")


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of the messages, in plain values, every `content` one text.  BadRequest: any other shape."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise BadRequest(f"messages must be a list of at least one message, not {messages!r:.80}")
    return [_check_message(message, f"message {i}") for i, message in enumerate(messages)]


def _check_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} is {message!r:.80}; it must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRequest(f"{where} has the role {role!r:.80}; it must be one of {', '.join(ROLES)}")
    checked: dict[str, Any] = plain(dict(message), where)
    if content is None and message.get("tool_calls"):
        return checked
    if isinstance(content, list | tuple):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where} has the content {content!r:.80}; it must be text or a list of text parts")
    return checked | {"content": content}


def _text_part(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadRequest(
        f'{where} has the part {part!r:.80}; this engine reads {{"type": "text", "text": ...}} only'
    )


def plain(value: Any, where: str) -> Any:
    """A copy made of plain JSON values, whose methods can do no harm.  BadRequest: anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    raise BadRequest(f"{where} holds a {type(value).__name__}; chat templates take plain JSON values only")
