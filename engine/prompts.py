"""A caller's prompt, as token ids for each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nudging.errors import BadRequest
from nudging.params import is_int
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


def read_chat(messages: Messages, roles: Sequence[Role]) -> dict[str, RolePrompt]:
    """The conversation as each role's own template writes it.  Raises BadRequest."""
    prompts = {}
    for role in roles:
        text = role.template.render(messages, add_generation_prompt=True)
        prompts[role.name] = _read(text, role, special=role.template.needs_special_tokens)
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
