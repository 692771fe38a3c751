"""How a request is served among others: options that change when its tokens come, and no token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from nudging.checks import plain, unknown_option
from nudging.core.sampling_params import is_int, is_number
from nudging.errors import BadRequest

PRIORITY_LIMIT = 1 << 31
# How the ids begin that no caller may give.
OWN_IDS = ("request-", "generation-")


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


class SubmitOptions(RequestOptions, total=False):
    """`request_id`: the id of one prompt's request, for `abort` and logs; None, the default, for one of the
    engine's own.
    """

    request_id: str | None


class ChatOptions(SubmitOptions, total=False):
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


def read_request_options(options: Mapping[str, Any]) -> RequestOptions:
    """The options of requests, without those that are None.  Raises BadRequest."""
    return _read(options, RequestOptions.__annotations__)  # type: ignore[return-value]


def read_submit_options(options: Mapping[str, Any]) -> tuple[str | None, RequestOptions]:
    """The id that a request shall have, and its other options.  Raises BadRequest."""
    read = _read(options, SubmitOptions.__annotations__)
    request_id = read.pop("request_id", None)
    if request_id is not None and (not isinstance(request_id, str) or not request_id):
        raise BadRequest(f"request_id is {request_id!r}; it must be None or a str that is not empty")
    if request_id is not None and request_id.startswith(OWN_IDS):
        raise BadRequest(
            f"request_id is {request_id!r}; ids that begin with {' or '.join(OWN_IDS)} are the engine's own"
        )
    return request_id, read  # type: ignore[return-value]


def _read(options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise unknown_option("a request", unknown, known)
    read = {name: plain(value) for name, value in options.items() if value is not None}
    priority, timeout = read.get("priority", 0), read.get("timeout")
    if not is_int(priority) or abs(priority) >= PRIORITY_LIMIT:
        raise BadRequest(
            f"priority is {priority!r}; it must be a whole number and less than {PRIORITY_LIMIT} from 0"
        )
    if not isinstance(read.get("cache_salt", ""), str):
        raise BadRequest(f"cache_salt is {read['cache_salt']!r}; it must be None or a str")
    if timeout is not None and (not is_number(timeout) or timeout <= 0):
        raise BadRequest(f"timeout is {timeout!r}; it must be None or a number of seconds above 0")
    return read


def read_seconds(name: str, value: Any) -> float | None:
    """A time to wait, None for as long as it takes.  Raises BadRequest."""
    value = plain(value)
    if value is not None and (not is_number(value) or value < 0):
        raise BadRequest(f"{name} is {value!r}; it must be None or a number of seconds from 0 on")
    return value  # type: ignore[no-any-return]
