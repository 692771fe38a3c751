"""A caller's prompt, as token ids for each role."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from nudging.checks import is_int, plain
from nudging.errors import BadRequest
from nudging.text.roles import Role
from nudging.text.template_options import TemplateOptions

Ids = Iterable[int]
Prompt = str | Ids | Mapping[str, "str | Ids"]
Messages = Sequence[Mapping[str, Any]]
# One prompt in the form that other engines give it: a text or ids by name, for all roles or for each.
NAMED = ("prompt", "prompt_token_ids")
KINDS = "a str, a list of token ids, or a dict of either per role"


@dataclass(frozen=True)
class RolePrompt:
    """One role's prompt: its ids, and the text they came from (None where the caller gave ids).

    `special`: whether the tokenizer's own special tokens were added; a chat template writes them itself.
    """

    ids: list[int]
    text: str | None = None
    special: bool = True


ChatReader = Callable[[Messages, Sequence[Role]], dict[str, RolePrompt]]


def list_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts in order, from one or from any iterable of them, and whether they are several.

    Raises BadRequest.
    """
    prompts = _as_list("prompts", prompts, (str, Mapping), "one prompt or a list of them")
    if isinstance(prompts, str | Mapping) or (prompts and _is_id(prompts[0])):
        return [prompts], False
    return list(prompts), True


def list_chats(messages: Any) -> list[Any]:
    """Several conversations in order, from one or from any iterable of them.  Raises BadRequest."""
    listed = _as_list("messages", messages, (), "a list of messages or a list of such lists")
    # A message may be an object of any class: the template's reader tells what it can use.
    are_several = bool(listed) and isinstance(listed[0], list | tuple | Iterator)
    return list(listed) if are_several else [listed]


def list_continuations(continuations: Any) -> tuple[list[Any], bool]:
    """The continuations in order, and whether they are several: a text or a list of ids is one."""
    listed = _as_list("continuation", continuations, (str,), "text, token ids or a list of either")
    single = isinstance(listed, str) or not listed or _is_id(listed[0])
    return ([listed], False) if single else (list(listed), True)


def _as_list(name: str, value: Any, single: tuple[type, ...], kinds: str) -> Any:
    """`value` as it is where it is of a `single` type, else as a list.  Raises BadRequest."""
    value = _array(value)
    if isinstance(value, single):
        return value
    # A set has no order, and the letters of bytes are no ids.
    wrong = isinstance(value, str | bytes | bytearray | Mapping | Set)
    if wrong or not isinstance(value, Iterable):
        raise BadRequest(f"{name} is {_kind(value)}; give {kinds}")
    return value if isinstance(value, list) else list(value)


def read_prompt(prompt: Prompt, roles: Sequence[Role], known: Iterable[str] = ()) -> dict[str, RolePrompt]:
    """The prompt of every role, checked against its model; `known` are the roles that it may name beside
    them.  Raises BadRequest.
    """
    if isinstance(prompt, Mapping) and any(name in prompt for name in NAMED):
        prompt = _read_named(prompt)
    if isinstance(prompt, Iterator):
        # Every role reads it.
        prompt = list(prompt)
    if not isinstance(prompt, Mapping):
        return {role.name: _read(prompt, role) for role in roles}
    names = [role.name for role in roles]
    unknown = [name for name in prompt if name not in {*names, *known}]
    if unknown:
        raise unknown_role(unknown, dict.fromkeys([*known, *names]))
    missing = [name for name in names if name not in prompt]
    if missing:
        raise BadRequest(
            f"the prompt is given for {', '.join(map(repr, prompt)) or 'no role'} and the policy also needs "
            f"{', '.join(map(repr, missing))}; add one for each role, or give one prompt for all"
        )
    return {role.name: _read(prompt[role.name], role) for role in roles}


def unknown_role(names: Iterable[object], known: Iterable[str]) -> BadRequest:
    """The error for a prompt of roles that are not open."""
    known, named = list(known), ", ".join(map(repr, names))
    close = difflib.get_close_matches(named.strip("'"), known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return BadRequest(f"the prompt names the role {named}{hint}; open are {', '.join(known)}")


def _read_named(prompt: Mapping[str, Any]) -> Any:
    """What stands in {"prompt": ...} or {"prompt_token_ids": ...}.  Raises BadRequest."""
    if len(prompt) != 1:
        raise BadRequest(
            f"the prompt has {', '.join(map(repr, prompt))}; give {' or '.join(NAMED)} and nothing beside it"
        )
    return next(iter(prompt.values()))


def chat_reader(options: TemplateOptions) -> ChatReader:
    """What reads a conversation with these options.

    Raises BadRequest for an option of the wrong kind or given twice.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
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
    return functools.partial(read_chat, given)


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


def read_continuation(text: Any, roles: Sequence[Role]) -> list[int]:
    """The ids of what follows a text, given as text or as ids that all roles have.  Raises BadRequest."""
    size = min(role.vocab_size for role in roles)
    text = _array(text)
    if isinstance(text, str):
        tokenizer = roles[0].tokenizer
        if tokenizer is None:
            raise BadRequest("the continuation is text and this checkpoint has no tokenizer; give token ids")
        text = tokenizer.encode_continuation(text)
    ids = read_ids("the continuation", text, size)
    if not ids:
        raise BadRequest("the continuation is empty; give at least one character or one token id")
    return ids


def read_ids(name: str, value: Any, size: int, owner: str = "") -> list[int]:
    """Token ids below `size`, those of `owner`, from any iterable of whole numbers.  Raises BadRequest."""
    value = _array(value)
    # A set has no order, and the letters of bytes are no ids.
    wrong = isinstance(value, str | bytes | bytearray | Mapping | Set)
    if wrong or not isinstance(value, Iterable):
        raise BadRequest(f"{name} is {_kind(value)}; give a list of token ids")
    ids = [token if type(token) is int else plain(token) for token in value]
    for token in ids:
        if not is_int(token) or not 0 <= token < size:
            raise BadRequest(
                f"{name} holds {token!r:.80}, which is no token id{owner}: ids go from 0 to {size - 1}"
            )
    return ids


def _read(prompt: Any, role: Role, special: bool = True) -> RolePrompt:
    prompt = _array(prompt)
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


def _read_ids(prompt: Any, role: Role) -> list[int]:
    if isinstance(prompt, bytes | bytearray | Mapping | Set) or not isinstance(prompt, Iterable):
        raise BadRequest(f"the prompt is {_kind(prompt)}; give {KINDS}")
    ids = read_ids("the prompt", prompt, role.vocab_size, f" of {role.name!r}")
    if not ids:
        raise BadRequest("the prompt is empty; give at least one character or one token id")
    return ids


def _is_id(value: Any) -> bool:
    return is_int(value if type(value) is int else _array(value))


def _array(value: Any) -> Any:
    """Arrays as lists; the lists of a long prompt are not walked through."""
    return plain(value) if hasattr(value, "shape") else value


def _kind(value: object) -> str:
    """A wrong value by its kind: its own words could be long."""
    return "None" if value is None else f"a {type(value).__name__}"
