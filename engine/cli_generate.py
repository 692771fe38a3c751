"""`nudging generate`: prompts from a JSONL file, texts to another, in the same order."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from nudging.cli_options import (
    model_options,
    open_llm,
    option,
    policy_options,
    read_params,
    read_policy,
    sampling_options,
    stop_options,
)
from nudging.errors import BadRequest
from nudging.options import unknown_option

if TYPE_CHECKING:
    from nudging.api import LLM
    from nudging.handle import Handle
    from nudging.output import CompletionOutput, RequestOutput
    from nudging.params import SamplingParams
    from nudging.policies.protocol import Policy

KEYS = ("prompt", "prompt_token_ids", "messages")
OPTIONS = ("priority", "timeout")
ROLES = ("base", "guide")


@click.command()
@option("--base", required=True, metavar="CHECKPOINT", help="A directory, a hub id or pocket:NAME.")
@option("--guide", metavar="CHECKPOINT", help="Likewise; without it the base writes alone.")
@policy_options
@option("--max-tokens", type=int, default=16, help="The most tokens of a text.")
@sampling_options
@option("--n", type=int, default=1, help="Texts for each prompt; a line each, numbered by `sample`.")
@stop_options
@option("--logprobs", type=int, help="Add every token's log-probability and those of this many likeliest.")
@model_options
@option(
    "--input",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="JSONL with prompt, prompt_token_ids or messages a line; - is standard input.",
)
@option("--prompt", help="One prompt, instead of --input.")
@option(
    "--output",
    default="-",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    help="JSONL, a line for each line of the input; - is standard output.",
)
@option(
    "--progress/--no-progress",
    default=None,
    show_default="where standard error is a terminal",
    help="Bars on standard error.",
)
@click.pass_context
def generate(
    ctx: click.Context, /, base: str, guide: str | None, progress: bool | None, **flags: Any
) -> None:
    """Write a text for every prompt of a file.

    A line that cannot be served gives {"index", "error"}, the others go on, and the exit status is 1.
    """
    params, policy = read_params(flags), read_policy(flags, has_guide=guide is not None)
    lines = read_lines(flags["input"], flags["prompt"])
    check_output(flags["output"])
    shown = is_progress_shown(flags["output"]) if progress is None else progress
    with ExitStack() as stack:
        llm = stack.enter_context(open_llm(flags, base, guide, shown))
        check_request(llm, params, policy)
        out = open_output(flags["output"], stack)
        jobs = [start(llm, line, params, policy) for line in lines]
        failed = write_results(jobs, out, shown)
    if failed:
        ctx.exit(1)


def read_lines(path: str | None, prompt: str | None) -> list[bytes]:
    """The lines of the input.  Blank ones at its end are none; elsewhere they keep their number."""
    if (path is None) == (prompt is None):
        given = "neither" if path is None else "both"
        raise BadRequest(f"{given} of --input and --prompt is given; give one (--input - is standard input)")
    if path is None:
        return [json.dumps({"prompt": prompt}).encode()]
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    lines = data.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_line(line: bytes) -> tuple[str, Any, dict[str, Any]]:
    """What a line of the input asks for: one of KEYS, its value, and OPTIONS.  Raises BadRequest."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f'the line is not JSON ({error}); give an object such as {{"prompt": "..."}}'
        ) from error
    if not isinstance(record, dict):
        raise BadRequest(f"the line is {kind_of(record)}; give an object with one of {', '.join(KEYS)}")
    options = {key: record.pop(key) for key in OPTIONS if key in record}
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        raise unknown_option("a line", unknown, KEYS + OPTIONS)
    if len(record) != 1:
        raise BadRequest(
            f"the line has {' and '.join(record) or 'no key'}; give exactly one of {', '.join(KEYS)}"
        )
    [(key, value)] = record.items()
    check_value(key, value)
    return key, value, options


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


def check_output(path: str) -> None:
    """Raise BadRequest before anything is loaded where the output cannot be written."""
    folder = Path(path).parent
    if path != "-" and not folder.is_dir():
        raise BadRequest(f"--output is {path!r} and {str(folder)!r} is not a directory; create it")


def is_progress_shown(output_path: str) -> bool:
    """Bars are for people, and must not run into the texts on the same terminal."""
    return sys.stderr.isatty() and not (output_path == "-" and sys.stdout.isatty())


def check_request(llm: LLM, params: SamplingParams, policy: Policy) -> None:
    """Raise BadRequest for what no line could mend: the flags and these models do not go together."""
    from nudging.arguments import check_ids
    from nudging.roles import check_policy

    check_policy(policy, llm.roles)
    check_ids(params, [llm.roles[name] for name in policy.roles])


def open_output(path: str, stack: ExitStack) -> BinaryIO:
    """Unbuffered: who follows the file sees each line when it is written."""
    if path == "-":
        return sys.stdout.buffer
    return stack.enter_context(open(path, "wb", buffering=0))  # type: ignore[return-value]


def start(llm: LLM, line: bytes, params: SamplingParams, policy: Policy) -> Handle | BadRequest:
    """The running job of a line, or what is wrong with it."""
    try:
        key, value, options = read_line(line)
        submit = llm.submit_chat if key == "messages" else llm.submit
        return submit(value, params, policy, **options)
    except BadRequest as error:
        return error


def write_results(jobs: list[Handle | BadRequest], out: BinaryIO, shown: bool) -> bool:
    """Write every job's lines in order, each when it and those before it are there.  True: some failed."""
    from nudging.cli_progress import Meter

    failed = False
    with Meter([job for job in jobs if not isinstance(job, BadRequest)], shown) as meter:
        for index, job in enumerate(jobs):
            if isinstance(job, BadRequest):
                records = [error_record(index, job)]
            else:
                records = result_records(index, meter.wait(job))
            for record in records:
                failed = failed or "error" in record
                write_line(out, record)
    return failed


def result_records(index: int, result: RequestOutput) -> list[dict[str, Any]]:
    """The output lines of one prompt; with several texts each has its number as `sample`."""
    several = len(result.outputs) > 1
    return [
        {"index": index, **({"sample": output.index} if several else {}), **output_record(output)}
        for output in result.outputs
    ]


def output_record(output: CompletionOutput) -> dict[str, Any]:
    """One text as a line of output; without a tokenizer its texts are null."""
    if output.error is not None:
        return {"error": {"type": type(output.error).__name__, "message": str(output.error)}}
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


def error_record(index: int, error: BadRequest) -> dict[str, Any]:
    return {"index": index, "error": {"type": type(error).__name__, "message": str(error)}}


def write_line(out: BinaryIO, record: dict[str, Any]) -> None:
    """Write a whole line, or none of it."""
    # Half a character that JSON text cannot hold is escaped, as JSON allows.
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    data = memoryview(line.encode("utf-8", errors="backslashreplace"))
    with interrupts_held():
        while data:
            data = data[out.write(data) :]
        out.flush()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; a second one does not.

    Only where it would raise KeyboardInterrupt: a job that ignores it goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    held = False

    def hold(*_: object) -> None:
        nonlocal held
        if held:
            raise KeyboardInterrupt
        held = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if held:
        raise KeyboardInterrupt
