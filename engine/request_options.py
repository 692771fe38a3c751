"""How a request is served among others: options that change when its tokens come, and no token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from nudging.errors import BadRequest
from nudging.options import unknown_option
from nudging.params import is_int, is_number

PRIORITY_LIMIT = 1 << 31


class RequestOptions(TypedDict, total=False):
    """`priority`: lower ones run earlier and may take the memory of higher ones, 0 without.

    `timeout`: seconds from submission after which the request ends as it is, with the finish reason "abort"
    and DeadlineExceeded as its error; None, the default, for no limit.

    `cache_salt`: what was computed for one salt is not reused for another, so that nobody can find out by
    timing what somebody else has asked; requests without one share.
    """

    priority: int
    timeout: float | None
    cache_salt: str | None


class ChatOptions(RequestOptions, total=False):
    """Options of a request, and arguments of transformers' `apply_chat_template` with their meaning there.

    `tools`: JSON schemas; `documents`: objects with title and text; `add_generation_prompt`: the prompt ends
    where the assistant's next turn begins, True unless `continue_final_message`, with which the last message
    goes on (a str names its field, else "content"); `chat_template`: a Jinja source, or the name of one of
    the checkpoint's templates, for all roles or by role; `chat_template_kwargs`: further variables of the
    template such as enable_thinking.  What a template does not read has no effect there.
    """

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | str | None
    chat_template: str | Mapping[str, str] | None
    chat_template_kwargs: Mapping[str, Any] | None


def check_request_options(options: Mapping[str, object]) -> None:
    """Raise BadRequest for an option that is not known or out of range."""
    known = RequestOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise unknown_option("a request", unknown, known)
    priority: Any = options.get("priority", 0)
    timeout: Any = options.get("timeout")
    if not is_int(priority) or abs(priority) >= PRIORITY_LIMIT:
        raise BadRequest(
            f"priority is {priority!r}; it must be a whole number and less than {PRIORITY_LIMIT} from 0"
        )
    if not isinstance(options.get("cache_salt"), str | None):
        raise BadRequest(f"cache_salt is {options['cache_salt']!r}; it must be None or a str")
    if timeout is not None and (not is_number(timeout) or timeout <= 0):
        raise BadRequest(f"timeout is {timeout!r}; it must be None or a number of seconds above 0")
