"""One model writes everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nudging.policies.protocol import Step, View
from nudging.policies.rule import ALONE, Rule


@dataclass(frozen=True)
class Solo:
    """The role `writer` writes every token; its end of sequence ends the text."""

    writer: ClassVar[str] = "base"
    lookahead: ClassVar[int] = 0
    shares_ids: ClassVar[bool] = True
    needs_tokenizer: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.writer,)

    def start(self) -> Any:
        return None

    def step(self, view: View, state: Any) -> Step:
        token = view.row(self.writer).token
        if view.is_eos(self.writer, token):
            return Step(finish="stop")
        return Step((token,), self.writer)

    def owner(self, view: View, state: Any, token: int) -> tuple[str, Any]:
        return self.writer, None


@dataclass(frozen=True)
class Base(Solo):
    """The base alone."""

    writer: ClassVar[str] = "base"
    rule: ClassVar[Rule] = ALONE


@dataclass(frozen=True)
class Guide(Solo):
    """The guide alone."""

    writer: ClassVar[str] = "guide"
    rule: ClassVar[Rule] = ALONE
