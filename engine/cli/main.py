"""The command line.  Commands import what they need when they run: `nudging --help` loads no torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from nudging.cli.bench import bench
from nudging.cli.chat import chat
from nudging.cli.demo import demo
from nudging.cli.generate import generate
from nudging.cli.info import info
from nudging.cli.signals import Interrupted
from nudging.errors import BadRequest, CheckpointError, NudgingError

INTERRUPTED = 130
# As a shell says it of a program that SIGPIPE has ended.
UNREAD = 141


class Failure(click.ClickException):
    """Something went wrong: the message on standard error, exit status 1."""

    exit_code = 1


class Mistake(click.ClickException):
    """Something was asked wrongly: the message on standard error, exit status 2."""

    exit_code = 2


class Commands(click.Group):
    """Commands, listed as they were added, that may raise the package's errors and be interrupted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Here the help of all is shown.
        with statuses(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with statuses(ctx):
            return super().invoke(ctx)


@contextmanager
def statuses(ctx: click.Context) -> Iterator[None]:
    """Errors, signals and readers that go away, as messages and exit statuses."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where not every character can be written, one that cannot is no reason to fail.
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BadRequest, CheckpointError) as error:
        raise Mistake(str(error)) from error
    except NudgingError as error:
        raise Failure(str(error)) from error
    except BrokenPipeError:
        # A reader that went away is no failure of ours, and there is nobody to tell.
        give_up_output()
        ctx.exit(UNREAD)
    except OSError as error:
        give_up_output()
        raise Failure(str(error)) from error
    except Interrupted as error:
        ctx.exit(error.status)
    except KeyboardInterrupt:
        # Whatever comes next on the terminal begins on a line of its own.
        click.echo(err=True)
        ctx.exit(INTERRUPTED)


def give_up_output() -> None:
    """What cannot be written to standard output goes nowhere: at its end Python would try once more."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


SETTINGS = {
    "auto_envvar_prefix": "NUDGING",
    "show_default": True,
    "help_option_names": ["-h", "--help"],
}


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(package_name="nudging", allow_from_autoenv=False)
def main() -> None:
    """Several language models write one text together: a large base model and a small aligned guide.

    Every flag of a command can also be given in the environment: --base of generate is NUDGING_GENERATE_BASE.
    """


def promised(name: str, purpose: str) -> click.Command:
    """A command that is part of the interface and not built yet: it says so, whatever it is given."""
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}

    @click.command(
        name, help=purpose, short_help=f"{purpose[:-1]} (not built yet).", context_settings=anything
    )
    def command() -> None:
        raise Failure(f"`nudging {name}` is not built yet")

    return command


for command in (
    demo,
    generate,
    chat,
    promised("serve", "Answer requests over HTTP."),
    bench,
    promised("inspect", "Look into a text, token by token."),
    info,
):
    main.add_command(command)
