"""A caller's prompt, as token ids for each role."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nudging.errors import BadRequest
from nudging.options import unknown_option
from nudging.params import is_int
from nudging.request_options import ChatOptions, RequestOptions
from nudging.roles import Role

Prompt = str | Sequence[int] | Mapping[str, "str | Sequence[int]"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RolePrompt:
    """One role's prompt: its ids, and the text they came from (None where the caller gave ids).

    `special`: whether the tokenizer's own special tokens were added; a chat template writes them itself.
    """

    ids: list[int]
    text: str | None = None
    special: bool = True


ChatReader = Callable[[Messages, Sequence[Role]], dict[str, RolePrompt]]


def read_prompt(prompt: Prompt, roles: Sequence[Role]) -> dict[str, RolePrompt]:
    """The prompt of every role, checked against its model.  Raises BadRequest."""
    if not isinstance(prompt, Mapping):
        return {role.name: _read(prompt, role) for role in roles}
    missing = [role.name for role in roles if role.name not in prompt]
    if missing:
        raise BadRequest(
            f"the prompt is given for {', '.join(map(repr, prompt)) or 'no role'} and the policy also needs "
            f"{', '.join(map(repr, missing))}; add one for each role, or give one prompt for all"
        )
    return {role.name: _read(prompt[role.name], role) for role in roles}


def chat_reader(options: ChatOptions) -> tuple[ChatReader, RequestOptions]:
    """What reads a conversation with these options, and those of them that are the request's.

    Raises BadRequest for an option that is not known, of the wrong kind or given twice.
    """
    known = ChatOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise unknown_option("a chat", unknown, known)
    rest: Any = {name: value for name, value in options.items() if name in RequestOptions.__annotations__}
    given: dict[str, Any] = {
        name: value for name, value in options.items() if name not in rest and value is not None
    }
    variables = given.pop("chat_template_kwargs", {})
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise BadRequest(f"chat_template_kwargs is {variables!r:.80}; it must map names to variables")
    twice = sorted(given.keys() & variables.keys())
    if twice:
        raise BadRequest(f"{', '.join(twice)} stands in chat_template_kwargs, too; leave one of them")
    given = {**variables, **given}
    for name, kinds in (("add_generation_prompt", bool), ("continue_final_message", bool | str)):
        if not isinstance(given.get(name, False), kinds):
            raise BadRequest(f"{name} is {given[name]!r:.80}; it must be True or False")
    if "messages" in given:
        raise BadRequest("chat_template_kwargs holds messages; give them as the first argument")
    return functools.partial(read_chat, given), rest


def read_chat(given: Mapping[str, Any], messages: Messages, roles: Sequence[Role]) -> dict[str, RolePrompt]:
    """The conversation as each role's own template writes it, with the arguments `given` of
    `ChatTemplate.render`; `chat_template` may be by role.  Raises BadRequest.
    """
    templates = given.get("chat_template")
    strange = templates.keys() - {role.name for role in roles} if isinstance(templates, Mapping) else ()
    if strange:
        raise BadRequest(
            f"chat_template names {', '.join(map(repr, sorted(strange)))}; the policy's roles are "
            f"{', '.join(role.name for role in roles)}"
        )
    prompts = {}
    for role in roles:
        own = {"chat_template": templates.get(role.name)} if isinstance(templates, Mapping) else {}
        text = role.template.render(messages, **(dict(given) | own))
        is_replaced = (own or given).get("chat_template") is not None
        special = role.template.needs_special_tokens and not is_replaced
        prompts[role.name] = _read(text, role, special=special)
    return prompts


def _read(prompt: str | Sequence[int], role: Role, special: bool = True) -> RolePrompt:
    if isinstance(prompt, str):
        result = _read_text(prompt, role, special)
    else:
        result = RolePrompt(_read_ids(prompt, role))
    if len(result.ids) >= role.max_len:
        raise BadRequest(
            f"the prompt has {len(result.ids)} tokens and the context of {role.name!r} is {role.max_len}, "
            "of which one must stay free; shorten the prompt"
        )
    return result


def _read_text(text: str, role: Role, special: bool) -> RolePrompt:
    if role.tokenizer is None:
        raise BadRequest(
            f"the prompt is text and the checkpoint of {role.name!r} has no tokenizer; give token ids"
        )
    ids = role.tokenizer.encode(text, special=special)
    if not text or not ids:
        raise BadRequest("the prompt is empty; give at least one character or one token id")
    return RolePrompt(ids, text, special)


def _read_ids(prompt: Sequence[int], role: Role) -> list[int]:
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        kind = type(prompt).__name__
        raise BadRequest(
            f"the prompt is a {kind}; give a str, a list of token ids, or a dict of either per role"
        )
    if len(prompt) == 0:
        raise BadRequest("the prompt is empty; give at least one character or one token id")
    for token in prompt:
        if not is_int(token) or not 0 <= token < role.vocab_size:
            raise BadRequest(
                f"the prompt holds {token!r}, which is no token id of {role.name!r}: ids go from 0 to "
                f"{role.vocab_size - 1}"
            )
    return list(prompt)
