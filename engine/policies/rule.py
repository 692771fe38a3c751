"""What a policy says as data of how it writes, so that fast paths need not run its code.

A policy that has a `rule` promises: its `step` writes what the rule says, and nothing else.  The core in C++
carries its requests, and recorded cycles run them on the device, without knowing its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Writer = Literal["alone", "token", "word"]


@dataclass(frozen=True)
class Rule:
    """`writer` "alone": the first role writes every token, and its end of sequence ends the text.

    Otherwise the base writes its pick where it is sure, and where it is not, the guide writes one "token" or
    its next "word".  The base is unsure where its top-1 probability is below `threshold`, or equal to it if
    `or_equal`; above 1 the base is not asked at all.  A word ends before the first token whose text begins
    with a space, at the latest after `lookahead` tokens; a guide's end of sequence among these ends the text
    with the tokens before it.
    """

    writer: Writer
    threshold: float = 0.0
    or_equal: bool = False
    lookahead: int = 0

    def is_unsure(self, top_prob: float) -> bool:
        """Whether a base this sure leaves the token to the guide."""
        return top_prob < self.threshold or (self.or_equal and top_prob == self.threshold)

    @property
    def asks_base(self) -> bool:
        """Whether the base has a say: no probability is above 1."""
        return self.threshold <= 1


# One model alone.
ALONE = Rule("alone")


def rule_of(policy: Any) -> Rule | None:
    """The policy's rule; None where it has none, or where its class inherits one.

    A subclass may write otherwise than its parent: it has a rule where it declares one itself.
    """
    declares = "rule" in vars(type(policy))
    rule = policy.rule if declares else None
    return rule if isinstance(rule, Rule) else None
