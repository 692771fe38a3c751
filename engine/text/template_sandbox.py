"""The room a checkpoint's chat template runs in: Hugging Face's dialect of Jinja, sandboxed and metered.

A template is data that came with a checkpoint, so nothing it does may touch the process, and a mistake in it
may not hang a server.  Loop rounds and the characters that its operators and calls build draw on one budget
per rendering.  That stops runaway loops and doubling strings; it does not foresee every single operation that
asks Python for a huge string (a `center` filter of enormous width): only a limit on the process stops those.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.runtime import str_join as join_as_text
from jinja2.sandbox import ImmutableSandboxedEnvironment

WORK_LIMIT = 2**26  # characters built; one block of template code entered counts as BLOCK_COST of them
BLOCK_COST = 2**7
OUTPUT_LIMIT = 2**22  # characters of one rendered chat
POWER_LIMIT = 2**12  # bits of an integer that ** makes
_METER = "nudging meter"  # not an identifier, so that no template can name or shadow it


class Meter:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self._left = WORK_LIMIT

    def spend(self, cost: int) -> None:
        """TemplateRuntimeError when the budget is gone."""
        self._left -= cost
        if self._left < 0:
            raise TemplateRuntimeError(f"the template did more work than its limit of {WORK_LIMIT} units")


class _MeteredCode(CodeGenerator):
    """Jinja's compiler, with a charge for every block entered (a loop's round, a macro) and every `~`."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline(f"environment.spend(context, {BLOCK_COST})")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; to a reader it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The Jinja environment of one chat template."""

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def write(self, template: Template, variables: dict[str, Any]) -> str:
        """What the template makes of the variables, on a fresh budget.

        TemplateError, or any error that an expression of the template may raise in Python.
        """
        pieces: list[str] = []
        size = 0
        for piece in template.generate(variables | {_METER: Meter()}):
            pieces.append(piece)
            size += len(piece)
            if size > OUTPUT_LIMIT:
                raise TemplateRuntimeError(f"the chat is longer than the limit of {OUTPUT_LIMIT} characters")
        return "".join(pieces)

    def spend(self, context: Context, cost: int) -> None:
        """Charge the rendering that `context` belongs to."""
        context.parent[_METER].spend(cost)

    def join(self, context: Context, parts: tuple[Any, ...]) -> str:
        """The `~` operator."""
        text = join_as_text(parts)
        self.spend(context, len(text))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The intercepted operators; what multiplication and powers would build is charged beforehand."""
        if operator == "*":
            self.spend(context, max(_product_size(left, right), _product_size(right, left)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right
            if bits > POWER_LIMIT:
                raise TemplateRuntimeError(f"a power of {bits} bits is beyond the limit of {POWER_LIMIT}")
        result = super().call_binop(context, operator, left, right)
        if operator == "+":
            self.spend(context, _size(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """A call in a template; what it returns is charged."""
        result = super().call(__context, __obj, *args, **kwargs)
        __self.spend(__context, _size(result))
        return result


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _product_size(sequence: Any, times: Any) -> int:
    return _size(sequence) * times if isinstance(times, int) else 0


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
