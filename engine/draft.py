"""Drafting ahead: computing rows before the policy asks for them.  It makes steps succeed earlier,
nothing else.

The guide's own continuation is the draft.  Where the base's row is missing, the base reads the draft in the
same pass and answers after each of its tokens; the policy then runs on for as long as the text follows it.
"""

from __future__ import annotations

from nudging.adaptive import Ledger, draft_length
from nudging.request import Draft, Need, Request
from nudging.view import MissingRow, RequestView

DRAFTER = "guide"


def draft_ahead(request: Request, view: RequestView, ledger: Ledger, need: Need) -> Need:
    """The need to compute next: `need` itself, or with a draft behind it, or the row a draft waits for."""
    if request.policy.shares_ids:
        for role, sequence in request.sequences.items():
            sequence.forget_rows_before(len(request.prompts[role].ids) + len(request.output))
    if request.known_ahead:
        return _read_known(request, need)
    if need.role != "base" or DRAFTER not in request.policy.roles or not request.policy.shares_ids:
        return need
    if request.draft is None or request.draft.start != len(request.output) or request.draft.tokens:
        settle_draft(request, ledger)
        request.draft = Draft(len(request.output), _length(request, view, ledger, need))
    if request.draft.length == 0:
        return need
    try:
        rows = view.draft(DRAFTER, request.draft.length)
    except MissingRow as missing:
        return missing.need
    tokens = [row.token for row in rows if not view.is_eos(DRAFTER, row.token)]
    request.sequences["base"].set_context(need.first, tokens)
    request.draft.tokens = tokens
    request.counters.drafted += len(tokens)
    return Need("base", need.first, min(need.first + len(tokens), request.roles["base"].max_len))


def settle_draft(request: Request, ledger: Ledger) -> None:
    """Count how much of the last draft became text, and learn from it."""
    draft, request.draft = request.draft, None
    if draft is None or not draft.tokens:
        return
    written = request.output[draft.start :]
    pairs = zip(draft.tokens, written, strict=False)
    accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(draft.tokens), len(written)))
    request.counters.accepted += accepted
    # What the end of the text cut off was not refused.
    ledger.learn(min(len(draft.tokens), len(written)), accepted)


def _length(request: Request, view: RequestView, ledger: Ledger, need: Need) -> int:
    """How many tokens to draft now: what the caller fixed, or what pays."""
    limit = view.max_tokens - 1
    if request.draft_len is not None:
        return min(request.draft_len, limit)
    base, guide = request.sequences["base"], request.sequences[DRAFTER]
    end = len(request.prompts[DRAFTER].ids) + len(request.output)
    return draft_length(ledger, need.first - base.num_computed, max(end - guide.num_computed, 1), limit)


def _read_known(request: Request, need: Need) -> Need:
    """All rows along the tokens that are known to come."""
    ahead = request.known_ahead[len(request.output) :]
    request.sequences[need.role].set_context(need.first, ahead)
    return Need(need.role, need.first, min(need.first + len(ahead) - 1, request.roles[need.role].max_len))
