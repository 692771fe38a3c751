"""`nudging generate`: prompts from a JSONL file, texts to another, in the same order."""

from __future__ import annotations

import functools
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from nudging.cli.input import Ask, open_input, read_lines
from nudging.cli.options import (
    TokenLimit,
    model_options,
    open_llm,
    option,
    policy_options,
    read_params,
    read_policy,
    sampling_options,
    stop_options,
)
from nudging.cli.output import Writer, Written, check_files, open_output, read_written
from nudging.cli.progress import Meter
from nudging.cli.signals import Interrupted
from nudging.cli.stream import Stream
from nudging.errors import BadRequest

if TYPE_CHECKING:
    from nudging.api.handle import Handle
    from nudging.api.llm import LLM
    from nudging.core.sampling_params import SamplingParams
    from nudging.policies.protocol import Policy


@click.command()
@option("--base", required=True, metavar="CHECKPOINT", help="A directory, a hub id or pocket:NAME.")
@option("--guide", metavar="CHECKPOINT", help="Likewise; without it the base writes alone.")
@policy_options
@option(
    "--max-tokens",
    type=TokenLimit(),
    default=16,
    metavar="N|none",
    help="The most tokens of a text; none: as far as the context goes.",
)
@sampling_options
@option("--n", type=int, default=1, help="Texts for each prompt; a line each, numbered by `sample`.")
@stop_options
@option("--logprobs", type=int, help="Add every token's log-probability and those of this many likeliest.")
@option("--prompt-logprobs", type=int, help="Likewise, of the prompt's tokens as the base reads them.")
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
    help="A line for each line of the input, written as soon as it and those before it are there; - is "
    "standard output.",
)
@option(
    "--format",
    type=click.Choice(["jsonl", "text"]),
    default="jsonl",
    help="jsonl: a record for each text; text: the text alone, and errors on standard error.",
)
@option("--resume", is_flag=True, help="Go on where the --output of an earlier run ends.")
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

    A line may also have an "id", which comes back with its text, "sampling" with fields of SamplingParams
    that go before the flags, "priority" and "timeout".  Blank lines are none.  A line that cannot be served
    gives {"index", "error"}, the others go on, and the exit status is 1.

    Ctrl-C and SIGTERM leave whole lines, of which --resume takes up the rest: lines of the input that are
    answered are skipped, once their ids were found to be those of the answers.
    """
    params, policy = read_params(flags), read_policy(flags, has_guide=guide is not None)
    check_files(flags)
    shown = is_progress_shown(flags["output"]) if progress is None else progress
    with ExitStack() as stack:
        lines = open_input(flags["input"], flags["prompt"], stack)
        written = read_written(flags["output"]) if flags["resume"] else Written()
        lines = skip(lines, written, params)
        if flags["resume"]:
            tell_resumed(flags["output"], written)
        llm = stack.enter_context(open_llm(flags, base, guide, shown))
        check_request(llm, params, policy, flags["format"])
        writer = Writer(open_output(flags["output"], written.size, stack), flags["format"])
        total = count_lines(flags["input"]) if shown else None
        meter = stack.enter_context(Meter(shown, total, len(written.ids)))
        submit = functools.partial(start, llm, policy)
        stream = Stream(lines, params, submit, writer, meter, first=len(written.ids))
        try:
            stream.run()
        except Interrupted as error:
            click.echo(f"\n{error}: {stream.num_written} lines are answered{how_to_go_on(flags)}", err=True)
            raise
    if writer.failed or any(written.is_error):
        ctx.exit(1)


def skip(lines: Iterator[bytes], written: Written, params: SamplingParams) -> Iterator[bytes]:
    """The lines that have no answer yet.  Raises BadRequest where those that have are other ones."""
    for index in range(len(written.ids)):
        line = next(lines, None)
        if line is None:
            raise BadRequest(
                f"--output has answers to {len(written.ids)} lines and the input has {index}; give the input "
                "that the output was begun with"
            )
        written.check(index, line, params)
    return lines


def tell_resumed(path: str, written: Written) -> None:
    errors = sum(written.is_error)
    of_them = f", {errors} of them with an error" if errors else ""
    click.echo(f"{path}: {len(written.ids)} lines are answered{of_them}; going on behind them", err=True)


def how_to_go_on(flags: dict[str, Any]) -> str:
    return "" if flags["output"] == "-" or flags["format"] != "jsonl" else "; --resume goes on behind them"


def is_progress_shown(output_path: str) -> bool:
    """Bars are for people, and must not run into the texts on the same terminal."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal and not (output_path == "-" and sys.stdout.isatty())


def count_lines(path: str | None) -> int | None:
    """How many lines the input has, where it can be read twice."""
    if path is None:
        return 1
    if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
        return None
    with open(path, "rb", buffering=0) as file:
        return sum(1 for _ in read_lines(file))


def check_request(llm: LLM, params: SamplingParams, policy: Policy, form: str) -> None:
    """Raise BadRequest for what no line could mend: the flags and these models do not go together."""
    from nudging.core.policy_check import check_ids, check_policy

    check_policy(policy, llm.roles)
    check_ids(params, [llm.roles[name] for name in policy.roles])
    if form == "text" and llm.roles["base"].tokenizer is None:
        raise BadRequest("--format text needs a tokenizer and the base has none; use --format jsonl")


def start(llm: LLM, policy: Policy, ask: Ask) -> Handle:
    """The running job of a line.  Raises BadRequest, EngineClosed."""
    submit = llm.submit_chat if ask.key == "messages" else llm.submit
    return submit(ask.value, ask.params, policy, **ask.options)
