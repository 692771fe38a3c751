"""The output of `nudging generate`: a line for each text, and what a resumed run finds of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from nudging.checks import is_int
from nudging.cli.input import Ask, BadLine, read_line
from nudging.core.sampling_params import SamplingParams
from nudging.errors import BadRequest

if TYPE_CHECKING:
    from nudging.api.outputs import CompletionOutput, RequestOutput

# How every record begins.
BEGINNING = b'{"index": '


def check_files(flags: dict[str, Any]) -> None:
    """Raise BadRequest before anything is loaded where the output cannot be written as asked."""
    path, resume = flags["output"], flags["resume"]
    if resume and path == "-":
        raise BadRequest("--resume goes on with a file and --output is standard output; give --output FILE")
    if resume and flags["format"] != "jsonl":
        raise BadRequest("--resume finds its place by the lines of --format jsonl; leave one of the two away")
    if path == "-":
        if sys.stdout is None:
            raise BadRequest("standard output is closed; give --output FILE")
    else:
        folder = Path(path).parent
        if not folder.is_dir():
            raise BadRequest(f"--output is {path!r} and {str(folder)!r} is not a directory; create it")
        if not Path(path).exists() and not os.access(folder, os.W_OK):
            raise BadRequest(f"--output is {path!r} and nothing may be written in {str(folder)!r}")
    files = {name: identity(flags[name], name) for name in ("input", "output", "trace") if flags[name]}
    for one, other in itertools.combinations(files, 2):
        if files[one] is not None and files[one] == files[other]:
            raise BadRequest(f"--{other} is the file of --{one} and would overwrite it; give another one")


def identity(path: str, name: str) -> tuple[int, int] | None:
    """Which regular file a path or a standard stream is; None where it is none."""
    try:
        standard = sys.stdin if name == "input" else sys.stdout
        found = os.fstat(standard.fileno()) if path == "-" else os.stat(path)
    except (OSError, AttributeError):
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


@dataclass(frozen=True)
class Written:
    """What an output has already: the ids of its lines of input, how many were errors, and where it ends."""

    ids: tuple[str | int | None, ...] = ()
    is_error: tuple[bool, ...] = ()
    size: int = 0

    def check(self, index: int, line: bytes, params: SamplingParams) -> None:
        """Raise BadRequest where a line of the input is not the one that was answered."""
        try:
            asked: Ask | BadLine = read_line(line, params)
        except BadLine as error:
            asked = error
        if asked.id != self.ids[index]:
            raise BadRequest(
                f"line {index + 1} of the input has the id {asked.id!r} and its answer in --output has "
                f"{self.ids[index]!r}; give the input that the output was begun with"
            )
        if isinstance(asked, BadLine) and not self.is_error[index]:
            raise BadRequest(
                f"line {index + 1} of the input asks for nothing that could be answered ({asked}) and "
                "--output has a text for it; give the input that the output was begun with"
            )


def read_written(path: str) -> Written:
    """What stands in an output up to its last whole answer; nothing where there is no file.

    Raises BadRequest where it is not what `generate` writes.
    """
    if not Path(path).exists():
        return Written()
    ids: list[str | int | None] = []
    errors: list[bool] = []
    size = last = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and BEGINNING.startswith(line[: len(BEGINNING)]):
                # Its writer was killed in the midst of it: it is written again.
                break
            record = read_record(line)
            index, sample = record.get("index"), record.get("sample", 0)
            if index == len(ids) and sample == 0:
                ids.append(record.get("id"))
                errors.append(False)
                last, samples = size, 0
            elif not ids or index != len(ids) - 1 or sample != samples + 1:
                raise BadRequest(
                    f"line {number} of --output {path!r} is not what generate would have written next; "
                    "give another --output, or leave --resume away to write it anew"
                )
            samples = sample
            errors[-1] |= "error" in record
            size += len(line)
            several = "sample" in record
    if ids and several:
        # More of the last prompt's texts may have been to come: they are written again.
        return Written(tuple(ids[:-1]), tuple(errors[:-1]), last)
    return Written(tuple(ids), tuple(errors), size)


def read_record(line: bytes) -> dict[str, Any]:
    """A line of output; an empty record where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and is_int(record.get("index")) else {}


def open_output(path: str, keep: int, stack: ExitStack) -> BinaryIO:
    """The output behind its first `keep` bytes.  A file has no buffer: a follower sees all lines."""
    if path == "-":
        return sys.stdout.buffer
    mode = "r+b" if keep else "wb"
    file: Any = stack.enter_context(open(path, mode, buffering=0))  # noqa: SIM115 - the stack closes it
    if keep:
        file.truncate(keep)
        file.seek(keep)
    return file  # type: ignore[no-any-return]


class Writer:
    """Writes results in one format, and counts those that are errors."""

    def __init__(self, out: BinaryIO, form: str) -> None:
        self._out = out
        self._lines: Callable[..., Iterator[str]] = {"jsonl": as_jsonl, "text": as_text}[form]
        self.failed = 0

    def write(self, index: int, own_id: str | int | None, result: RequestOutput | BadRequest) -> None:
        """All lines of one prompt."""
        outputs = () if isinstance(result, BadRequest) else result.outputs
        self.failed += isinstance(result, BadRequest) or any(one.error is not None for one in outputs)
        for line in self._lines(index, own_id, result):
            # Half a character that JSON text cannot hold is escaped, as JSON allows.
            data = memoryview(line.encode("utf-8", errors="backslashreplace"))
            while data:
                data = data[self._out.write(data) :]
            self._out.flush()


def as_text(index: int, own_id: str | int | None, result: RequestOutput | BadRequest) -> Iterator[str]:
    """Texts as they are; an error is told on standard error, and the line of its text is empty."""
    texts: list[tuple[BaseException | None, str | None]]
    if isinstance(result, BadRequest):
        texts = [(result, None)]
    else:
        texts = [(one.error, one.text) for one in result.outputs]
    for error, text in texts:
        if error is not None:
            told = error_record(error)
            click.echo(f"line {index + 1}: {told['type']}: {told['message']}", err=True)
        yield f"{'' if error is not None else text}\n"


def as_jsonl(index: int, own_id: str | int | None, result: RequestOutput | BadRequest) -> Iterator[str]:
    """A record for each text; with several texts each has its number as `sample`."""
    head: dict[str, Any] = {"index": index, **({} if own_id is None else {"id": own_id})}
    if isinstance(result, BadRequest):
        records = [{**head, "error": error_record(result)}]
    else:
        several = len(result.outputs) > 1
        if result.prompt_logprobs is not None:
            head["prompt_logprobs"] = [one and dataclasses.asdict(one) for one in result.prompt_logprobs]
        records = [
            {**head, **({"sample": output.index} if several else {}), **output_record(output)}
            for output in result.outputs
        ]
    for record in records:
        yield json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def output_record(output: CompletionOutput) -> dict[str, Any]:
    """One text as a record; without a tokenizer its texts are null."""
    if output.error is not None:
        return {"error": error_record(output.error)}
    has_text = output.text is not None
    record: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "authors": output.authors,
        "segments": [
            {"author": s.author, "text": s.text if has_text else None, "token_ids": s.token_ids}
            for s in output.segments
        ],
        "finish_reason": output.finish_reason,
        "stats": dataclasses.asdict(output.stats),
    }
    if output.logprobs is not None:
        record["logprobs"] = [None if one is None else dataclasses.asdict(one) for one in output.logprobs]
    return record


def error_record(error: BaseException) -> dict[str, str]:
    # What a line is refused for is the caller's affair, not how it was found.
    kind = BadRequest if isinstance(error, BadLine) else type(error)
    return {"type": kind.__name__, "message": str(error)}
