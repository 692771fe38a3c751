"""`nudging chat`: talk with the pair in a terminal."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from typing import TYPE_CHECKING, Any

import click

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
from nudging.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from nudging.api.llm import LLM
    from nudging.api.outputs import RequestOutput
    from nudging.core.sampling_params import SamplingParams
    from nudging.policies.protocol import Policy

HELP = "/reset starts over, /quit ends (or Ctrl-D), Ctrl-C stops an answer"


@click.command()
@option(
    "--base",
    metavar="CHECKPOINT",
    show_default="the pocket pair",
    help="A directory, a hub id or pocket:NAME.",
)
@option("--guide", metavar="CHECKPOINT", help="Likewise; --base without it is the base alone.")
@policy_options
@option(
    "--max-tokens",
    type=TokenLimit(),
    default=256,
    metavar="N|none",
    help="The most tokens of an answer; none: as far as the context goes.",
)
@sampling_options
@stop_options
@model_options
@option("--message", help="Say this, print the answer and end.")
def chat(base: str | None, guide: str | None, message: str | None, **flags: Any) -> None:
    """Talk with a base and its guide in the terminal.

    What the guide writes is coloured.
    """
    from nudging.cli.terminal import Terminal

    if message is None and sys.stdin is None:
        raise BadRequest("standard input is closed; give --message")
    if base is None:
        base, guide = "pocket:base", guide or "pocket:guide"
    params, policy = read_params(flags), read_policy(flags, has_guide=guide is not None)
    with open_llm(flags, base, guide, progress=sys.stderr.isatty()) as llm:
        talk = Talk(llm, params, policy, Terminal())
        if message is None:
            talk.run()
        elif talk.say(message).outputs[0].finish_reason == "abort":
            raise KeyboardInterrupt


class Talk:
    """A conversation: what was said so far, and how answers are written."""

    def __init__(self, llm: LLM, params: SamplingParams, policy: Policy, console: Console) -> None:
        self._llm = llm
        self._params = params
        self._policy = policy
        self._console = console
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Read and answer until the end of the input."""
        from nudging.cli.terminal import Ink

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() line editing
        prompt = "> " if sys.stdin.isatty() else ""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # One byte that is no UTF-8 costs its character, not the talk.
            sys.stdin.reconfigure(errors="replace")
        self._console.print(Ink(self._console).legend().append(f"; {HELP}"), highlight=False)
        while (line := read_message(prompt)) != "/quit":
            if line == "/reset":
                self._messages.clear()
            elif line.startswith("/"):
                self._console.print(f"there is no {line.split()[0]}; {HELP}", markup=False, highlight=False)
            elif line:
                self._try(line)

    def _try(self, message: str) -> None:
        """Answer; an interrupted answer stays as far as it came, one that cannot be given is not asked."""
        began = time.perf_counter()
        try:
            result = self.say(message)
        except BadRequest as error:
            self._console.print(f"{error} (or /reset)", style="red", markup=False, highlight=False)
            return
        except KeyboardInterrupt:
            # It came before there was an answer to stop.
            self._console.print()
            return
        stats = result.outputs[0].stats
        speed = stats.tokens / (time.perf_counter() - began)
        figures = f"({stats.tokens} tokens, {speed:.0f} tokens/s, {stats.nudge_rate:.0%} by the guide)"
        self._console.print(figures, style="dim", highlight=False)

    def say(self, message: str) -> RequestOutput:
        """Print the answer to `message` while it is written; Ctrl-C ends it with "abort".

        Raises BadRequest, and the error that ended the answer.
        """
        from nudging.cli.terminal import Ink, show

        asked = {"role": "user", "content": message}
        handle = self._llm.submit_chat([*self._messages, asked], self._params, self._policy)
        ink = Ink(self._console)
        try:
            for delta in handle:
                show(self._console, ink.write(delta.segments))
        except KeyboardInterrupt:
            handle.cancel()
        show(self._console, ink.end(), end="\n")
        result = handle.result()
        output = result.outputs[0]
        if output.error is not None:
            raise output.error
        self._messages += [asked, {"role": "assistant", "content": output.text or ""}]
        return result


def read_message(prompt: str) -> str:
    """The next line; the end of the input is /quit."""
    try:
        return input(prompt).strip()
    except EOFError:
        if prompt:
            # What comes next on the terminal begins on a line of its own.
            print()
        return "/quit"
