"""Where drafts come from.  A drafter only proposes: whether its tokens become text, the policy decides."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

from nudging.core.policy_view import RequestView
from nudging.core.request import Request
from nudging.core.speculation.ledger import MAX_ADAPTIVE_DRAFT, Drafting
from nudging.policies.protocol import Facts

# How much of the text's end has to occur earlier: a longer match foretells better, one token nothing.
MAX_NGRAM = 4
MIN_NGRAM = 2


class Drafter(Protocol):
    """Proposes what may come after a request's text."""

    def serves(self, policy: Facts, role: str) -> bool:
        """Whether `role` reads drafts behind the text where the policy misses its row."""

    def drafting(self, view: RequestView) -> Drafting:
        """What a draft takes now."""

    def propose(self, request: Request, view: RequestView, role: str, length: int) -> list[int]:
        """At most `length` tokens for `role` to read, none of them an end of sequence.

        Raises MissingRow where a model has to answer first.
        """


class GuideDrafter:
    """The guide's own continuation: what it writes where the base is unsure, and mostly elsewhere."""

    def serves(self, policy: Facts, role: str) -> bool:
        return role == "base" and "guide" in policy.roles

    def drafting(self, view: RequestView) -> Drafting:
        # What its look-ahead has said beyond the last word is a draft that was paid for.
        return Drafting("guide", *view.known_path("guide"))

    def propose(self, request: Request, view: RequestView, role: str, length: int) -> list[int]:
        tokens = [row.token for row in view.draft("guide", length)]
        return [token for token in tokens if not view.is_eos("guide", token)]


class NgramDrafter:
    """Prompt lookup: what followed the text's last tokens where they stood before.  It asks no model."""

    def serves(self, policy: Facts, role: str) -> bool:
        return role == policy.roles[0]

    def drafting(self, view: RequestView) -> Drafting:
        return Drafting("", MAX_ADAPTIVE_DRAFT)

    def propose(self, request: Request, view: RequestView, role: str, length: int) -> list[int]:
        tokens = look_up(request.prompts[role].ids + request.output, length)
        return list(takewhile(lambda token: not view.is_eos(role, token), tokens))


# With "none" nothing is drafted.
DRAFTERS: dict[str, Drafter | None] = {"guide": GuideDrafter(), "ngram": NgramDrafter(), "none": None}


def look_up(ids: Sequence[int], length: int) -> list[int]:
    """The `length` tokens that followed the latest earlier occurrence of the longest known end of `ids`.

    An end is known if its MIN_NGRAM to MAX_NGRAM tokens stand in `ids` before; without one there is no draft.
    Where what followed runs into the end of `ids`, the text is taken to repeat itself from there.
    """
    # bytes.rfind searches at the speed of memory; a token is `size` bytes.
    packed = array("i", ids)
    size, text = packed.itemsize, packed.tobytes()
    for n in range(min(MAX_NGRAM, len(ids) - 1), MIN_NGRAM - 1, -1):
        found = _rfind_aligned(text, text[-n * size :], size)
        if found is not None:
            start = found + n
            period = len(ids) - start
            return [ids[start + i % period] for i in range(length)]
    return []


def _rfind_aligned(text: bytes, end: bytes, size: int) -> int | None:
    """The last token index before its own end where the tokens `end` stand in `text`, None for none."""
    at = text.rfind(end, 0, len(text) - size)
    while at > 0 and at % size:
        at = text.rfind(end, 0, at + len(end) - 1)
    return None if at < 0 else at // size
