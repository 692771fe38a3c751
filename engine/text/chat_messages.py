"""A caller's messages as plain values that a chat template may be given, as transformers prepares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nudging.errors import BadRequest

Message = Mapping[str, Any]

MAX_DEPTH = 100  # of lists and objects within each other

# Names that a message's reasoning goes by; templates read the first, those of gpt-oss the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks where a message goes on.  The space shows whether the template keeps the space at a message's end.
_HERE = "THE_FINAL_MESSAGE_GOES_ON_HERE "


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages in plain values, nulls left out.  BadRequest: what is no message.

    Which roles there are and which keys they need, the template says.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise BadRequest(f"messages must be a list of at least one message, not {messages!r:.80}")
    return [_check_message(message, f"message {i}") for i, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict[str, Any]:
    values = plain(message, where)
    if not isinstance(values, dict):
        raise BadRequest(f"{where} is {message!r:.80}; it must be an object with role and content")
    role, content = values.get("role"), values.get("content")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{where} has the role {role!r:.80}; it must be a text such as 'user'")
    values = {key: value for key, value in values.items() if value is not None}
    if content is None and not values.keys() - {"role", "name"}:
        raise BadRequest(f"{where} has the content None; it must be text or a list of text parts")
    if role != "tool" and content is not None:
        _check_content(content, where)
    reasoning = next((values[key] for key in REASONING if key in values), None)
    return values if reasoning is None else {"thinking": reasoning, **values, "reasoning_content": reasoning}


def _check_content(content: object, where: str) -> None:
    if not isinstance(content, str | list):
        raise BadRequest(f"{where} has the content {content!r:.80}; it must be text or a list of text parts")
    for part in content if isinstance(content, list) else ():
        if not _is_text(part):
            raise BadRequest(
                f'{where} has the part {part!r:.80}; this engine reads {{"type": "text", "text": ...}} only'
            )


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def fitted(message: dict[str, Any], walks_parts: bool, takes_text: bool) -> dict[str, Any]:
    """The message with its content as the template reads it: parts where it walks through parts, else text.

    `takes_text`: whether a template that walks also has a branch for text.
    """
    content = message.get("content")
    if isinstance(content, list) and not walks_parts and all(map(_is_text, content)):
        return message | {"content": "".join(part["text"] for part in content)}
    if isinstance(content, str) and walks_parts and not takes_text:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


def left_open(messages: list[dict[str, Any]], field: str) -> tuple[list[dict[str, Any]], str]:
    """The messages with the place marked where the last one goes on, and the text before that place.

    BadRequest: the last message has no text under `field`.
    """
    last = dict(messages[-1])
    value = last.get(field)
    if isinstance(value, list) and value:
        at = max((i for i, part in enumerate(value) if _is_text(part)), default=-1)
        text = value[at]["text"] if at >= 0 else None
        if text is not None:
            last[field] = [*value[:at], value[at] | {"text": text + _HERE}, *value[at + 1 :]]
    else:
        text = value
        same = [name for name in REASONING if last.get(name) == text] if field in REASONING else [field]
        if isinstance(text, str):
            last |= dict.fromkeys(same, text + _HERE)
    if not isinstance(text, str):
        raise BadRequest(f"continue_final_message is set and the last message has no text in {field!r}")
    return [*messages[:-1], last], text


def cut_open(rendered: str, text: str) -> str:
    """What was rendered, up to the mark.  BadRequest: the template left the mark or the text out."""
    mark = _HERE.strip()
    if mark not in rendered or text.strip() not in rendered:
        raise BadRequest(
            f"continue_final_message is set and the model's chat template does not write {text!r:.80} as it "
            "stands, so that it cannot go on; change the last message or send text"
        )
    at = rendered.rindex(mark)
    if rendered[at : at + len(_HERE)] == _HERE:
        return rendered[:at]
    return rendered[:at].rstrip()  # the template strips messages


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain JSON values, whose methods can do no harm.  BadRequest: anything else."""
    if depth > MAX_DEPTH:
        raise BadRequest(f"{where} is nested more than {MAX_DEPTH} deep; make it flatter")
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # an enum, say
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), where, depth + 1) for f in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic's, such as those of OpenAI's client
        return plain(dump(), where, depth + 1)
    raise BadRequest(f"{where} holds a {type(value).__name__}; chat templates take plain JSON values only")


def check_objects(values: object, name: str, what: str) -> list[dict[str, Any]] | None:
    """A list of objects (tools, documents) in plain values.  BadRequest: anything else."""
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise BadRequest(f"{name} is {values!r:.80}; it must be a list of {what}")
    for item in values:
        if callable(item):
            raise BadRequest(
                f"{name} holds a function; give its {what} (transformers' get_json_schema makes it)"
            )
    found: list[Any] = plain(values, name)
    for item in found:
        if not isinstance(item, dict):
            raise BadRequest(f"{name} holds {item!r:.80}; it must be a list of {what}")
    return found
