"""What callers give an `LLM`, read and checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from nudging.api.loading import Checkpoint, LoadedModel
from nudging.checks import is_int, plain
from nudging.core.sampling_params import SamplingParams
from nudging.core.speculation.drafters import DRAFTERS
from nudging.errors import BadRequest
from nudging.kernels.draft_limits import MAX_DRAFT

Speculate = str | int


def check_sizes(**sizes: Any) -> None:
    """Raise BadRequest for a size that is neither None nor a whole number in range."""
    for name, value in sizes.items():
        if value is not None and (not is_int(value) or not 1 <= value <= 1 << 20):
            raise BadRequest(f"{name} is {value!r}; it must be a whole number from 1 to {1 << 20}")


def check_flags(**flags: Any) -> None:
    """Raise BadRequest for a switch that is neither None, True nor False."""
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise BadRequest(f"{name} is {value!r}; it must be True or False")


def check_file(name: str, value: Any) -> None:
    """Raise BadRequest for what is neither None nor the name of a file: a number would be an open file's.

    What is no file that can be written is found here, before a model is loaded.
    """
    if value is None:
        return
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not _can_be_a_name(path):
        raise BadRequest(f"{name} is {value!r}; it must be None or the path of a file to write")
    if os.path.isdir(path):
        raise BadRequest(f"{name} is {value!r}, a directory; give the path of a file in it")
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise BadRequest(f"{name} is {value!r} and {folder!r} is no directory; make it first")


def _can_be_a_name(path: str) -> bool:
    """Whether the system can be asked for a file of that name."""
    try:
        return bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def name_roles(base: Any, guide: Any, models: Any) -> dict[str, Checkpoint]:
    """The checkpoint of every role.  Raises BadRequest for a role named twice and what is no checkpoint."""
    further = {} if models is None else models
    if not isinstance(further, Mapping):
        raise BadRequest(f'models is {models!r}; give a map from roles to checkpoints, {{"guide-base": ...}}')
    twice = [name for name in ("base", "guide") if name in further]
    if twice:
        raise BadRequest(f"models= names {twice[0]!r}, which has an argument of its own; use {twice[0]}=...")
    named = {"base": base, **({} if guide is None else {"guide": guide}), **further}
    for role, checkpoint in named.items():
        if not isinstance(role, str) or not role:
            raise BadRequest(f"models= names the role {role!r}; a role is a str such as 'guide-base'")
        if not isinstance(checkpoint, str | os.PathLike | LoadedModel):
            raise BadRequest(
                f"the checkpoint of {role!r} is {checkpoint!r}; give a directory, a hub id, pocket:NAME or a "
                "LoadedModel"
            )
    return named


def read_templates(value: Any, roles: Mapping[str, Any]) -> dict[str, str]:
    """The chat template of each role that is given one.  Raises BadRequest."""
    named = value if isinstance(value, Mapping) else dict.fromkeys(roles, value)
    for role, template in named.items():
        if role not in roles:
            raise BadRequest(f"chat_template names the role {role!r}; the roles are {', '.join(roles)}")
        if template is not None and not isinstance(template, str):
            raise BadRequest(
                f"the chat_template of {role!r} is {template!r:.80}; give a Jinja source or a template's name"
            )
    return {role: template for role, template in named.items() if template is not None}


def read_speculate(value: Speculate) -> int | None:
    """The number of drafted tokens a pass; None for as many as pay.  Raises BadRequest."""
    value = plain(value)
    if value == "auto":
        return None
    if value == "off":
        return 0
    if not is_int(value) or not 0 <= int(value) <= MAX_DRAFT:
        raise BadRequest(
            f"speculate is {value!r}; it must be 'auto', 'off' or a whole number from 0 to {MAX_DRAFT}"
        )
    return int(value)


def read_drafter(value: Any) -> str:
    """The name of a drafter.  Raises BadRequest."""
    if not isinstance(value, str) or value not in DRAFTERS:
        raise BadRequest(f"drafter is {value!r}; it must be one of {', '.join(DRAFTERS)}")
    return value


def read_params(value: Any) -> SamplingParams:
    """Sampling parameters, the default ones for None.  Raises BadRequest."""
    if value is None:
        return SamplingParams()
    if not isinstance(value, SamplingParams):
        raise BadRequest(f"sampling_params is {kind_of(value)}; give SamplingParams(...)")
    return value


def spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of `count` prompts.  Raises BadRequest for a list of another length."""
    if not isinstance(value, list | tuple | Iterator):
        return [value] * count
    listed = list(value)
    if len(listed) != count:
        raise BadRequest(
            f"{name} has {len(listed)} entries and there are {count} prompts; give one, or one for each"
        )
    return listed


def kind_of(value: object) -> str:
    """What a wrong value is: a class by its name, else the value itself, shortened."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{value!r:.80}"
