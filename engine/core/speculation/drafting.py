"""Drafting ahead: computing rows before the policy asks for them.  It makes steps succeed earlier,
nothing else.

Where the row of the model that reads drafts is missing, it reads a draft in the same pass and answers after
each of its tokens; the policy then runs on for as long as the text follows it.
"""

from __future__ import annotations

from collections.abc import Mapping

from nudging.core.need import Draft, Need
from nudging.core.policy_view import MissingRow, RequestView
from nudging.core.request import Request
from nudging.core.speculation.drafters import DRAFTERS, Drafter
from nudging.core.speculation.ledger import Drafting, Ledger, draft_length, drafting_cost


def draft_ahead(
    request: Request, view: RequestView, ledger: Ledger, need: Need, sharers: Mapping[str, float]
) -> Need:
    """The need to compute next: `need` itself, or with a draft behind it, or the row a draft waits for.

    `sharers`: how many requests share the passes of each role now.
    """
    if request.facts.shares_ids:
        for role, sequence in request.sequences.items():
            sequence.forget_rows_before(len(request.prompts[role].ids) + len(request.output))
    if request.known_ahead:
        return _read_known(request, need)
    if _leads_a_draft(request, need):
        return _lead(request, view, ledger, sharers)
    drafter = DRAFTERS[request.drafter]
    if drafter is None or not _is_draftable(request, drafter, need):
        ledger.share(sharers)
        ledger.plan(_cost(request, ledger, need))
        return need
    draft = request.draft
    if draft is None or draft.start != len(request.output):
        settle_draft(request, ledger)
        ledger.share(sharers)
        draft = request.draft = Draft(len(request.output), _length(request, view, ledger, drafter, need))
    if draft.length and not draft.tokens:
        try:
            draft.tokens = drafter.propose(request, view, need.role, draft.length)
        except MissingRow as missing:
            return missing.need
        request.counters.drafted += len(draft.tokens)
        request.sequences[need.role].set_context(need.first, draft.tokens)
    last = min(need.first + len(draft.tokens), request.roles[need.role].max_len)
    return Need(need.role, need.first, last)


def settle_draft(request: Request, ledger: Ledger) -> None:
    """Count how much of the last draft became text, and learn from it."""
    draft, request.draft = request.draft, None
    if draft is None or not draft.tokens:
        return
    written = request.output[draft.start :]
    pairs = zip(draft.tokens, written, strict=False)
    accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(draft.tokens), len(written)))
    request.counters.accepted += accepted
    request.counters.cycles[accepted] = request.counters.cycles.get(accepted, 0) + 1
    # What the end of the text cut off was not refused.
    ledger.learn(min(len(draft.tokens), len(written)), accepted)


def _is_draftable(request: Request, drafter: Drafter, need: Need) -> bool:
    """Whether the need is for the row right after the text, and its role reads drafts there."""
    if not request.facts.shares_ids or not drafter.serves(request.facts, need.role):
        return False
    return need.first == len(request.prompts[need.role].ids) + len(request.output)


def _leads_a_draft(request: Request, need: Need) -> bool:
    """Whether the guide drafts on behind the token that it has to write: the base, which has answered, is
    computed by whole cycles, and those begin with the guide's next token.
    """
    if not request.drafts_under_way or need.role != "guide" or need.ahead:
        return False
    return need.first == request.context_length("guide")


def _lead(request: Request, view: RequestView, ledger: Ledger, sharers: Mapping[str, float]) -> Need:
    """The path of the guide's next token and a draft behind it, as long together as a draft."""
    settle_draft(request, ledger)
    ledger.share(sharers)
    length = min(request.drafts_under_way, view.max_tokens - 1)
    request.draft = Draft(len(request.output) + 1, max(length - 1, 0))
    if length > 0:
        drafting = drafting_cost(ledger, Drafting("guide", *view.known_path("guide")), length)
        ledger.plan(drafting + ledger.price("base", length, length))
    try:
        view.draft("guide", max(length, 1))
    except MissingRow as missing:
        return missing.need
    raise AssertionError("the guide's row is missing and was found")


def _length(request: Request, view: RequestView, ledger: Ledger, drafter: Drafter, need: Need) -> int:
    """How many tokens to draft now: what the caller fixed, or what pays; then their cost is planned."""
    limit = view.max_tokens - 1
    if request.draft_len is not None:
        return min(request.draft_len, limit)
    rows = need.first - request.sequences[need.role].num_computed
    drafting = drafter.drafting(view)
    length = draft_length(ledger, need.role, rows, drafting, limit)
    if length < limit or length > request.drafts_next:
        request.drafts_next = length
    # What the device has begun to draft is not given up.
    length = min(request.drafts_under_way, limit) or length
    read = ledger.price(need.role, rows + length, 1 + length)
    ledger.plan(drafting_cost(ledger, drafting, length) + read)
    return length


def _cost(request: Request, ledger: Ledger, need: Need) -> float:
    """The pass of a need without a draft; what lies ahead on its path the policy will ask for as it comes."""
    rows = need.last - request.sequences[need.role].num_computed
    return ledger.price(need.role, rows, need.last - need.first + 1)


def _read_known(request: Request, need: Need) -> Need:
    """All rows along the tokens that are known to come."""
    ahead = request.known_ahead[len(request.output) :]
    request.sequences[need.role].set_context(need.first, ahead)
    return Need(need.role, need.first, min(need.first + len(ahead) - 1, request.roles[need.role].max_len))
