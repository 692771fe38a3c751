"""What a model says after a prefix, and what is told of a token's probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from nudging.errors import BadRequest, NumericalError


class Row(NamedTuple):
    """What a model says after a prefix: the token it would write, and how sure it is.

    `token` is the pick under the request's sampling parameters and the noise of its output position;
    `top_token` and `top_prob` are the likeliest token and its probability at temperature 1, before any
    filter.  `kept`: the logits, where the policy or the request asked for them.
    """

    token: int
    top_token: int
    top_prob: float
    kept: Any = None

    @property
    def logits(self) -> Any:
        """[vocab] fp32.  Raises BadRequest where nobody asked for them."""
        if self.kept is None:
            raise BadRequest(
                "the policy reads row.logits and did not ask for them; give it needs_logits = True"
            )
        return self.kept


# The rows of one work; a row that is not finite is an error of its own.
Rows = list[Row | NumericalError]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a written token, and the likeliest tokens with theirs, at temperature 1."""

    token: int
    logprob: float
    top: dict[int, float]
