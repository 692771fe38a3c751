"""The writing rule, case by case: what every twin of it has to write (arXiv 2410.09300; policies/rule.py).

Odd tokens begin with a space; BASE_END and GUIDE_END are the models' own ends of sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

from nudging.kernels.draft_limits import LOOKAHEAD

BASE_END, GUIDE_END, VOCAB = 30, 32, 40
SURE, UNSURE = 0.9, 0.1


@dataclass(frozen=True)
class Case:
    """`base`: its pick and its top-1 probability after 0, 1, ... tokens of `path`, the guide's continuation.

    `wrote`: tokens and authors, "b" or "g", until a row is missing, a token leaves the path, or the text
    `ends`.
    """

    name: str
    base: tuple[tuple[int, float], ...]
    path: tuple[int, ...]
    wrote: tuple[tuple[int, str], ...]
    by_word: bool = False
    threshold: float = 0.5
    or_equal: bool = False
    ends: bool = False

    def __str__(self) -> str:
        return self.name


def by(author: str, *tokens: int) -> tuple[tuple[int, str], ...]:
    return tuple(zip(tokens, repeat(author)))


def sure(*tokens: int) -> tuple[tuple[int, float], ...]:
    return tuple((token, SURE) for token in tokens)


WORD = (2, 4, 6, 7, *range(8, 8 + 2 * LOOKAHEAD, 2))
LONG = tuple([2] * (LOOKAHEAD + 1))
NUDGE = ((2, UNSURE),)
TURNS = (*by("b", 3), *by("g", 5), *by("b", 8))
# A probability that every twin reads exactly.
ONE = ((3, 1.0),)
ZERO = ((3, 0.0),)

CASES = (
    Case("a sure base writes", sure(3), (3,), by("b", 3)),
    Case("an unsure base leaves a token", NUDGE, (3,), by("g", 3)),
    Case("equal is sure by <", ONE, (5,), by("b", 3), threshold=1.0),
    Case("equal is unsure by <=", ONE, (5,), by("g", 5), threshold=1.0, or_equal=True),
    Case("a threshold of 0 never asks the guide", ZERO, (5,), by("b", 3), threshold=0.0),
    Case("0 and <= leaves no probability", ZERO, (5,), by("g", 5), threshold=0.0, or_equal=True),
    Case("above 1 the base is not asked", (), (5, 4), by("g", 5, 4), threshold=1.5),
    Case("both go on along the path", (*sure(3), *NUDGE, *sure(8)), (3, 5, 8), TURNS),
    Case("a base that says otherwise leaves the path", sure(3, 4, 6), (3, 5, 6), by("b", 3, 4)),
    Case("the base's end ends its text", sure(BASE_END), (5,), (), ends=True),
    Case("the guide's end is no end of the base's", sure(GUIDE_END), (5,), by("b", GUIDE_END)),
    Case("the guide's end ends a nudge", NUDGE, (GUIDE_END,), (), ends=True),
    Case("the base's end is a token of the guide's", NUDGE, (BASE_END,), by("g", BASE_END)),
    Case("a word ends before the next space", NUDGE, WORD, by("g", 2, 4, 6), by_word=True),
    Case("a word's own space is no end", NUDGE, (7, *WORD), by("g", 7, 2, 4, 6), by_word=True),
    Case("a word needs the whole look-ahead", NUDGE, WORD[: LOOKAHEAD - 1], (), by_word=True),
    Case("a word is at most the look-ahead", NUDGE, LONG, by("g", *LONG[:LOOKAHEAD]), by_word=True),
    Case("an end in sight takes all before", NUDGE, (2, 3, 5, GUIDE_END), by("g", 2, 3, 5), True, ends=True),
    Case("an end at once is an empty ending", NUDGE, (GUIDE_END,), (), True, ends=True),
    Case("an end behind the look-ahead is none", NUDGE, (*LONG[1:], GUIDE_END), by("g", *LONG[1:]), True),
    Case("a sure base writes one token by word, too", sure(3), WORD, by("b", 3), by_word=True),
)
