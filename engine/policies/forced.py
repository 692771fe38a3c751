"""A text that is given, read under a policy: whose distribution each of its tokens counts under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from nudging.policies.protocol import Policy, Step, View


@runtime_checkable
class Owning(Policy, Protocol):
    """A policy that can say who would write at a position of a text it did not write itself."""

    def owner(self, view: View, state: Any, token: int) -> tuple[str, Any]:
        """The role that writes next, where `token` is what stands there, and the state after it."""


@dataclass(frozen=True)
class Forced:
    """`tokens` as they stand, each by the role that owns its position under `policy`."""

    policy: Owning
    tokens: tuple[int, ...]

    shares_ids: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True

    @property
    def roles(self) -> tuple[str, ...]:
        return self.policy.roles

    @property
    def lookahead(self) -> int:
        return self.policy.lookahead

    @property
    def needs_tokenizer(self) -> bool:
        return self.policy.needs_tokenizer

    def start(self) -> Any:
        return (0, None)

    def step(self, view: View, state: Any) -> Step:
        index, inner = state
        if index == len(self.tokens):
            return Step(finish="stop")
        token = self.tokens[index]
        author, inner = self.policy.owner(view, inner, token)
        view.row(author)
        return Step((token,), author, state=(index + 1, inner))
