"""The input of `nudging generate`: lines of any number, and what each asks for."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from nudging.checks import is_int, unknown_option
from nudging.core.request_options import ChatOptions, RequestOptions
from nudging.core.sampling_params import SamplingParams
from nudging.errors import BadRequest

KEYS = ("prompt", "prompt_token_ids", "messages")
OPTIONS = tuple(RequestOptions.__annotations__)
CHAT_OPTIONS = tuple(name for name in ChatOptions.__annotations__ if name not in OPTIONS)
ROLES = ("base", "guide")
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 16
# Of a longer line only so many bytes are kept, for the error that it is.
LINE_LIMIT = 1 << 26


def open_input(path: str | None, prompt: str | None, stack: ExitStack) -> Iterator[bytes]:
    """The lines of the input, blank ones left out, read as they are asked for.

    Raises BadRequest where there is not one input, OSError where it cannot be read.
    """
    if (path is None) == (prompt is None):
        given = "neither" if path is None else "both"
        raise BadRequest(f"{given} of --input and --prompt is given; give one (--input - is standard input)")
    if path is None:
        return iter([json.dumps({"prompt": prompt}).encode()])
    return read_lines(standard_input() if path == "-" else stack.enter_context(open(path, "rb", buffering=0)))


def standard_input() -> BinaryIO:
    """Standard input without a buffer, whose lock a thread that still reads at the end would hold."""
    if sys.stdin is None:
        raise BadRequest("standard input is closed; give --input FILE or --prompt")
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)


def read_lines(source: BinaryIO) -> Iterator[bytes]:
    """The lines that are not blank, without their ends and without a byte order mark."""
    for line in split_lines(source.read):
        line = line.removeprefix(BOM)
        if line.strip():
            yield line


def split_lines(read: Callable[[int], bytes | None]) -> Iterator[bytes]:
    """Everything up to each line feed; of a line longer than LINE_LIMIT its beginning, a little longer."""
    parts: list[bytes] = []
    size = 0
    while chunk := read(CHUNK):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join((*parts, end))
            parts, size = [], 0
        if size <= LINE_LIMIT:
            parts.append(rest)
            size += len(rest)
    if chunk is None:
        raise BlockingIOError(errno.EAGAIN, "the input does not wait for more; pipe it through cat")
    yield b"".join(parts)


@dataclass(frozen=True)
class Ask:
    """What a line asks for: one of KEYS and its value, under which parameters, as whose."""

    key: str
    value: Any
    params: SamplingParams
    id: str | int | None = None
    options: dict[str, Any] = field(default_factory=dict)


class BadLine(BadRequest):
    """A line that asks for nothing that can be done; `id` is its own, where it could be read."""

    def __init__(self, message: str, id: str | int | None = None) -> None:
        super().__init__(message)
        self.id = id


def read_line(line: bytes, params: SamplingParams) -> Ask:
    """What a line asks for; its own "sampling" goes before `params`.  Raises BadLine."""
    record = parse(line)
    own_id = record.pop("id", None)
    if own_id is not None and not (isinstance(own_id, str) or is_int(own_id)):
        raise BadLine(f"id is {kind_of(own_id)}; it must be text or a whole number")
    try:
        known = (*OPTIONS, *CHAT_OPTIONS) if "messages" in record else OPTIONS
        options = {key: record.pop(key) for key in known if key in record}
        merged = merge(params, record.pop("sampling", None))
        unknown = [key for key in record if key not in KEYS]
        if unknown:
            raise unknown_option("a line", unknown, (*KEYS, "id", "sampling", *known))
        if len(record) != 1:
            raise BadRequest(
                f"the line has {' and '.join(record) or 'no key'}; give exactly one of {', '.join(KEYS)}"
            )
        [(key, value)] = record.items()
        check_value(key, value)
    except BadRequest as error:
        raise BadLine(str(error), own_id) from error
    return Ask(key, value, merged, own_id, options)


def parse(line: bytes) -> dict[str, Any]:
    """A line's JSON object, as the standard has it.  Raises BadLine."""
    if len(line) > LINE_LIMIT:
        raise BadLine(f"the line has more than {LINE_LIMIT} bytes; give a shorter one")
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=refuse, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as error:
        raise BadLine(
            f'the line is not JSON ({error}); give an object such as {{"prompt": "..."}}'
        ) from error
    if not isinstance(record, dict):
        raise BadLine(f"the line is {kind_of(record)}; give an object with one of {', '.join(KEYS)}")
    return record


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; of two with one key nobody could say which is meant."""
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"the key {key!r} is there twice")
        record[key] = value
    return record


def merge(params: SamplingParams, own: Any) -> SamplingParams:
    """The parameters of a line with some of its own; null leaves what the flags say.  Raises BadRequest."""
    if own is None:
        return params
    if not isinstance(own, dict):
        raise BadRequest(f"sampling is {kind_of(own)}; give an object with fields of SamplingParams")
    known = [one.name for one in dataclasses.fields(SamplingParams)]
    unknown = [name for name in own if name not in known]
    if unknown:
        raise unknown_option("sampling", unknown, known)
    given = {name: value for name, value in own.items() if value is not None}
    if isinstance(given.get("logit_bias"), dict):
        # JSON's keys are text.
        bias = given["logit_bias"].items()
        given["logit_bias"] = {int(k) if k.isascii() and k.isdecimal() else k: value for k, value in bias}
    return dataclasses.replace(params, **given)


def check_value(key: str, value: Any) -> None:
    """Raise BadRequest where a line's value is of the wrong kind; what it says is the engine's to check."""
    if key != "messages" and isinstance(value, dict):
        unknown = [role for role in value if role not in ROLES]
        if unknown:
            raise unknown_option(key, unknown, ROLES)
        parts = {f"{key}[{role!r}]": part for role, part in value.items()}
    else:
        parts = {key: value}
    expected, name = (str, "text") if key == "prompt" else (list, "a list")
    for where, part in parts.items():
        if not isinstance(part, expected):
            raise BadRequest(f"{where} is {kind_of(part)}; it must be {name}")


def kind_of(value: Any) -> str:
    """A JSON value's type, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
