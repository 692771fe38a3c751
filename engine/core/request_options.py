"""How a request is served among others: options that change when its tokens come, and no token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from nudging.checks import is_int, is_number, plain, unknown_option
from nudging.errors import BadRequest
from nudging.text.template_options import TemplateOptions

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


class ChatOptions(SubmitOptions, TemplateOptions, total=False):
    """Options of a request, and those of its chat template."""


def split_chat_options(options: Mapping[str, Any]) -> tuple[TemplateOptions, SubmitOptions]:
    """The options of the template and those of the request.  Raises BadRequest for one that is neither's."""
    unknown = [name for name in options if name not in ChatOptions.__annotations__]
    if unknown:
        raise unknown_option("a chat", unknown, ChatOptions.__annotations__)
    template: Any = {
        name: value for name, value in options.items() if name in TemplateOptions.__annotations__
    }
    submit: Any = {name: value for name, value in options.items() if name not in template}
    return template, submit


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
