"""What a policy sees and says.

A policy is a pure function of rows and a small state: given what the models say about the text so far,
who writes what next.  It asks the view for rows as if they were all there.  Where one is missing the
view leaves the step, the engine computes the row, and the step runs again from the same state: that is
the whole mechanism.  Rows that were computed ahead (drafts) make the same steps succeed earlier and can
change nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from nudging.policies.rule import Rule, rule_of


class RowLike(Protocol):
    """A model's answer after a prefix; see `nudging.core.rows.Row`."""

    @property
    def token(self) -> int: ...
    @property
    def top_token(self) -> int: ...
    @property
    def top_prob(self) -> float: ...
    @property
    def logits(self) -> Any: ...


@dataclass(frozen=True)
class Completion:
    """A role's own continuation of a text: its pieces, their probabilities, and how it ended.

    `pieces[i]` is the text of token i (an end-of-sequence token has the text ""), `top_probs[i]` the top-1
    probability where it was written, `finish` is "stop" (an end-of-sequence token was written) or "length".
    """

    pieces: tuple[str, ...]
    top_probs: tuple[float, ...]
    text: str
    finish: str


class View(Protocol):
    """A request, as its policy sees it.  Every method that asks a model may leave the step; see above."""

    @property
    def max_tokens(self) -> int:
        """How many tokens the request may still write."""

    def row(self, role: str) -> RowLike:
        """What `role` says after the text so far."""

    def rollout(self, role: str, length: int) -> Sequence[RowLike]:
        """`role`'s own continuation of the text so far: `length` rows, fewer after an end of sequence."""

    def is_eos(self, role: str, token: int) -> bool:
        """Whether `token` ends the text when `role` writes it."""

    def starts_with_space(self, token: int) -> bool:
        """Whether the token's own text begins with a space (U+0020)."""

    def pick(self, logits: Any) -> int:
        """The request's choice from mixed logits [vocab] at this output position, with its own noise, under
        all of its parameters.

        Raises NumericalError, which ends the request, where the largest logit is not finite or one is NaN,
        and BadRequest for anything but one row.
        """

    def complete(self, role: str, text: str, length: int) -> Completion:
        """`role`'s continuation of prompt + `text`, tokenised afresh: at most `length` tokens."""

    def count_tokens(self, text: str) -> int:
        """How many tokens of the base's tokenizer `text` has."""


@dataclass(frozen=True)
class Step:
    """What a step decided: `tokens` by `author`, or whole texts by their authors, never both; then the next
    state.

    `finish` is None, "stop" or "length".  A step may write nothing and only move the state.  What it writes
    is cut at the request's `max_tokens`; only `texts` whose step says that it `overshoots` are not.
    """

    tokens: tuple[int, ...] = ()
    author: str = "base"
    texts: tuple[tuple[str, str], ...] = ()
    state: Any = None
    finish: str | None = None
    overshoots: bool = False


class Policy(Protocol):
    """A frozen dataclass with a `step`; write one and pass it.

    `roles` are the roles it asks, `lookahead` how many tokens past the text it may ask of one,
    `shares_ids` whether it needs one token vocabulary for all its roles, `needs_tokenizer` whether it
    reads text, `needs_logits` whether it reads `row.logits`.  A policy whose writing is a `Rule` may declare
    it as `rule`, in its own class, and is then written by the fast paths (`nudging.policies.rule`).
    """

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def lookahead(self) -> int: ...
    @property
    def shares_ids(self) -> bool: ...
    @property
    def needs_tokenizer(self) -> bool: ...
    @property
    def needs_logits(self) -> bool: ...
    def start(self) -> Any:
        """The state before the first step."""

    def step(self, view: View, state: Any) -> Step:
        """Decide what comes next."""


class Facts(NamedTuple):
    """What a policy says of itself, asked once: its properties are its author's code, and may do anything."""

    name: str
    roles: tuple[str, ...]
    lookahead: int
    shares_ids: bool
    needs_logits: bool
    rule: Rule | None


def facts_of(policy: Policy) -> Facts:
    """Raises whatever the policy's properties raise."""
    return Facts(
        repr(policy),
        tuple(policy.roles),
        policy.lookahead,
        bool(policy.shares_ids),
        bool(policy.needs_logits),
        rule_of(policy),
    )
