"""Log-probabilities of a prompt's own tokens: where they are asked for, its rows are read before the text."""

from __future__ import annotations

from collections.abc import Mapping

from nudging.core.executor import Sampler
from nudging.core.need import Need
from nudging.core.request import Request
from nudging.core.speculation.ledger import Ledger
from nudging.errors import NumericalError


def prompt_need(request: Request, ledger: Ledger, sharers: Mapping[str, float]) -> Need | None:
    """The rows of the prompt that are missing; None where they are there, or nobody asks for them.

    Of the texts of one prompt the first reads it.  `sharers`: how many requests share the passes of each role
    now.
    """
    known, is_first = request.prompt_logprobs, not request.siblings or request.siblings[0] is request
    if known is None or not is_first:
        return None
    role = request.first_role
    last = len(request.prompts[role].ids) - 1
    if len(known) > last:
        return None
    ledger.share(sharers)
    ledger.ask(role, last)
    sequence = request.sequences[role]
    sequence.want_row(len(known))
    ledger.plan(ledger.price(role, last - sequence.num_computed, last - len(known) + 1))
    return Need(role, len(known), last)


def take_prompt_rows(request: Request, sampler: Sampler) -> None:
    """Turn the rows of the prompt that came into log-probabilities; they are large, and forgotten."""
    known, params = request.prompt_logprobs, request.params
    if known is None or params.prompt_logprobs is None:
        return
    sequence, ids = request.sequences[request.first_role], request.prompts[request.first_role].ids
    while len(known) < len(ids) and (row := sequence.rows.pop(len(known), None)) is not None:
        if isinstance(row, NumericalError):
            request.fail(row)
            return
        known.append(sampler.logprob(row.logits, ids[len(known)], params.prompt_logprobs))
