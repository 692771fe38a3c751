"""What stands before a row, for parameters that look at it: penalties, bad words and the fewest tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nudging.core.fast_path_rules import ends_of
from nudging.core.request import Request


class Past(NamedTuple):
    """`prompt` and `output` are the ids before the row, `banned` those that must not be picked from it.

    All of it is a function of the tokens before the row: a row behind a draft has the past that the draft
    gives it, and counts only where the draft is the text.
    """

    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    banned: frozenset[int] = frozenset()


NO_PAST = Past()


def past_of(request: Request, role: str, tokens: Sequence[int], enders: Iterable[str] = ()) -> Past:
    """The past of the row of `role` that follows `tokens`: its prompt and what comes behind it.

    While the text has fewer than min_tokens, the ends of sequence of `enders` (of `role`, where none are
    given) and all stop ids are banned; what an open text had before this request is output, but not of it.
    """
    params = request.params
    if not params.reads_text:
        return NO_PAST
    begin = len(request.prompts[role].ids)
    start = max(begin - request.first_position, 0)
    output = tokens[start:]
    banned: set[int] = set()
    if len(tokens) - begin < params.min_tokens:
        banned.update(params.stop_token_ids, *(ends_of(request, name) for name in enders or (role,)))
    for *before, last in request.bad_words[role]:
        if list(output[max(len(output) - len(before), 0) :]) == before:
            banned.add(last)
    return Past(tokens[:start], output, frozenset(banned))
