"""Drafting ahead: computing rows before the policy asks for them.  It can make steps succeed earlier,
nothing else.

The guide's own continuation is the draft.  Where the base's row is missing, the base reads the draft in
the same pass and answers after each of its tokens; the policy then runs on for as long as the text
follows the draft.
"""

from __future__ import annotations

from nudging.request import Need, Request
from nudging.view import MissingRow, RequestView


def draft_ahead(request: Request, view: RequestView, need: Need) -> Need:
    """The need to compute next: `need` itself, or with a draft behind it, or the guide's row a draft
    waits for.
    """
    settle_draft(request)
    written = len(request.output)
    if request.policy.shares_ids:
        for role, sequence in request.sequences.items():
            sequence.forget_rows_before(len(request.prompts[role].ids) + written)
    if request.known_ahead:
        return _read_known(request, need)
    length = min(request.draft_len, view.max_tokens - 1)
    if length < 1 or need.role != "base" or "guide" not in request.policy.roles:
        return need
    try:
        rows = view.rollout("guide", length)
    except MissingRow as missing:
        return missing.need
    draft = [row.token for row in rows if not view.is_eos("guide", row.token)]
    request.sequences["base"].set_context(need.first, draft)
    request.draft = (written, draft)
    request.counters.drafted += len(draft)
    last = min(need.first + len(draft), request.roles["base"].max_len)
    return Need("base", need.first, last)


def _read_known(request: Request, need: Need) -> Need:
    """All rows along the tokens that are known to come."""
    ahead = request.known_ahead[len(request.output) :]
    request.sequences[need.role].set_context(need.first, ahead)
    return Need(need.role, need.first, min(need.first + len(ahead) - 1, request.roles[need.role].max_len))


def settle_draft(request: Request) -> None:
    """Count how much of the last draft became text."""
    start, draft = request.draft
    for drafted, written in zip(draft, request.output[start:], strict=False):
        if drafted != written:
            break
        request.counters.accepted += 1
    request.draft = (0, [])
