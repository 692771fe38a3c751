"""What a policy's step may say: checked before any of it is believed."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

from nudging.checks import is_text
from nudging.core.request import Request
from nudging.errors import BadRequest
from nudging.policies.protocol import Step

FINISHES = (None, "stop", "length")
# A policy may change its state so often without writing anything or asking for a row that is missing: the
# engine's thread is in it all the while.
MAX_STILL_STEPS = 1000


class Patience:
    """Counts the steps of one run of a policy in which its text stood still."""

    def __init__(self, request: Request) -> None:
        self._request, self._written, self._still = request, len(request.output), 0

    def check(self) -> None:
        """After a step.  Raises BadRequest for one too many that wrote nothing."""
        before, self._written = self._written, len(self._request.output)
        self._still = self._still + 1 if before == self._written else 0
        if self._still > MAX_STILL_STEPS:
            raise BadRequest(
                f"{self._request.facts.name} changed its state {self._still} times, wrote nothing and asked "
                f"for no row that is missing; {MAX_STILL_STEPS} times is the most: write or finish"
            )


def check_step(request: Request, said: object, vocab_size: Callable[[str], int]) -> Step:
    """The step that a policy has returned, its ids as plain ints.  `vocab_size`: of a role.

    Raises BadRequest for what is no step, or one that no request can follow.
    """
    name, roles = request.facts.name, request.facts.roles
    if not isinstance(said, Step):
        raise BadRequest(f"{name} returned a {type(said).__name__}; return Step(...)")
    if said.finish not in FINISHES:
        raise BadRequest(f"{name} finished with {said.finish!r}; finish is None, 'stop' or 'length'")
    if said.tokens and said.author not in roles:
        raise BadRequest(f"{name} wrote as {said.author!r}; it may write as {' or '.join(map(repr, roles))}")
    if said.tokens and said.texts:
        raise BadRequest(
            f"{name} wrote tokens {said.tokens!r:.80} and texts {said.texts!r:.80}; give one of them"
        )
    tokens = _ids(name, said.tokens, vocab_size(said.author) if said.tokens else 0)
    texts = _texts(name, said.texts, roles)
    if not tokens and not texts and said.finish is None and said.state == request.state:
        raise BadRequest(f"{name} wrote nothing, finished nothing and kept its state; it stands still")
    return Step(tokens, said.author, texts, said.state, said.finish, said.overshoots is True)


def _ids(name: str, tokens: Any, size: int) -> tuple[int, ...]:
    """A policy may write only ids that every one of its models can read."""
    if not isinstance(tokens, tuple | list):
        raise BadRequest(f"{name} wrote tokens {tokens!r}; give a tuple of token ids")
    ids = []
    for token in tokens:
        try:
            number = -1 if isinstance(token, bool) else index(token)
        except TypeError:
            number = -1
        if not 0 <= number < size:
            raise BadRequest(f"{name} wrote token {token!r}; ids go from 0 to {size - 1}")
        ids.append(number)
    return tuple(ids)


def _texts(name: str, texts: Any, roles: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    if not isinstance(texts, tuple | list):
        raise BadRequest(f"{name} wrote texts {texts!r}; give a tuple of (author, text)")
    for part in texts:
        fine = isinstance(part, tuple | list) and len(part) == 2 and part[0] in roles
        if not fine or not isinstance(part[1], str) or not is_text(part[1]):
            raise BadRequest(
                f"{name} wrote {part!r}; a text is (author, text), its author {' or '.join(map(repr, roles))}"
            )
    return tuple((author, text) for author, text in texts)
