"""Nudging (arXiv 2410.09300): the base speaks; where it is unsure, the guide speaks instead."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nudging.checks import strict
from nudging.errors import BadRequest
from nudging.kernels.draft_limits import LOOKAHEAD
from nudging.policies import reference
from nudging.policies.protocol import Step, View
from nudging.policies.rule import Rule

GRANULARITIES = ("word", "token", "reference")


@strict
@dataclass(frozen=True)
class Nudging:
    """Where the base's top-1 probability is below `threshold`, the guide writes.

    `granularity`: "token" lets the guide write one token, "word" (the paper) its next whole word,
    "reference" follows the authors' released client, at the level of text.  `overshoot`, for "reference"
    only: write past `max_tokens`, by up to two blocks of 16 tokens, where that client does.  `comparator`
    "<" or "<=": how the probability must compare with the threshold for the guide to write.  A threshold of
    0 is the base alone, one above 1 the guide alone (not for "reference", where the guide always begins).
    Raises BadRequest.
    """

    threshold: float = 0.4
    granularity: str = "word"
    comparator: str = "<"
    overshoot: bool = False

    roles: ClassVar[tuple[str, ...]] = ("base", "guide")
    needs_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold) or not 0 <= self.threshold <= 2:
            raise BadRequest(
                f"threshold is {self.threshold!r}; it must be a number from 0 (the base alone) "
                "to 2 (anything above 1 is the guide alone)"
            )
        if self.granularity not in GRANULARITIES:
            raise BadRequest(
                f"granularity is {self.granularity!r}; it must be one of {', '.join(GRANULARITIES)}"
            )
        if self.comparator not in ("<", "<="):
            raise BadRequest(f"comparator is {self.comparator!r}; it must be '<' or '<='")
        if not isinstance(self.overshoot, bool):
            raise BadRequest(f"overshoot is {self.overshoot!r}; it must be True or False")
        if self.overshoot and self.granularity != "reference":
            raise BadRequest(f"overshoot is for granularity='reference' and it is {self.granularity!r}")

    @property
    def lookahead(self) -> int:
        return 0 if self.granularity == "token" else LOOKAHEAD

    @property
    def shares_ids(self) -> bool:
        return self.granularity != "reference"

    @property
    def needs_tokenizer(self) -> bool:
        return self.granularity != "token"

    @property
    def _gate(self) -> Rule:
        writer: Literal["token", "word"] = "token" if self.granularity == "token" else "word"
        return Rule(writer, self.threshold, self.comparator == "<=", self.lookahead)

    @property
    def rule(self) -> Rule | None:
        """None for "reference", which works on text."""
        return None if self.granularity == "reference" else self._gate

    def start(self) -> Any:
        return reference.START if self.granularity == "reference" else None

    def step(self, view: View, state: Any) -> Step:
        if self.granularity == "reference":
            step = reference.step(view, state, self._gate.is_unsure)
            return dataclasses.replace(step, overshoots=True) if self.overshoot else step
        gate = self._gate
        if gate.asks_base:
            row = view.row("base")
            if not gate.is_unsure(row.top_prob):
                return write(view, "base", row.token)
        if self.granularity == "token":
            return write(view, "guide", view.row("guide").token)
        return self._word(view)

    def owner(self, view: View, state: Any, token: int) -> tuple[str, Any]:
        """The writer of `token`'s position in a given text; the state counts the guide's tokens of the
        current word.
        """
        if self.granularity == "reference":
            raise BadRequest(
                "granularity='reference' works on text and cannot score tokens; use 'word' or 'token'"
            )
        in_word = state or 0
        if self.granularity == "word" and 0 < in_word < self.lookahead and not view.starts_with_space(token):
            return "guide", in_word + 1
        gate = self._gate
        sure = gate.asks_base and not gate.is_unsure(view.row("base").top_prob)
        return ("base", 0) if sure else ("guide", 1)

    def _word(self, view: View) -> Step:
        """The guide's next word, or its whole ending when its look-ahead holds an end of sequence."""
        tokens = tuple([row.token for row in view.rollout("guide", self.lookahead)])
        if view.is_eos("guide", tokens[-1]):
            return Step(tokens[:-1], "guide", finish="stop")
        later = range(1, len(tokens))
        end = next((j for j in later if view.starts_with_space(tokens[j])), len(tokens))
        return Step(tokens[:end], "guide")


def write(view: View, role: str, token: int) -> Step:
    """One token by `role`; its own end of sequence ends the text."""
    return Step(finish="stop") if view.is_eos(role, token) else Step((token,), role)
