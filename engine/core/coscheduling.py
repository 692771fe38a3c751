"""In which order models run, and how far a path is written on before the dearest model answers everyone.

A pass of a large model costs nearly the same for one request as for many: requests that could be answered
together and are not cost a pass each.  So within a step the cheaper models go first, with a request's whole
path at once (a draft, the guide's next word), and the dearest model then answers all that have come to need
it.  Not at any price: those that are ready do not wait for a path longer than it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nudging.core.speculation.ledger import Costs, Ledger
from nudging.core.work import Work


def cheapest_first(costs: Mapping[str, Costs]) -> list[str]:
    """The models by what a pass of one row costs."""
    return sorted(costs, key=lambda model: costs[model].of(1, 1))


def path_steps(lengths: Sequence[int], ready: int, step_cost: float, answer_cost: float) -> int:
    """How many tokens of their paths the requests should get before the dearest model answers.

    lengths: the tokens, at least 1, that each request's path still wants; `ready` further requests need the
    dearest model only.  `step_cost`: of one token for all paths together; `answer_cost`: of the dearest
    model's pass.  After s steps that pass answers all that are ready and all with paths of at most s; the s
    with the most answers per time is chosen.  At least 1, so that no path stands still.
    """
    best, best_rate = 1, 0.0
    for steps in sorted(set(lengths)):
        answered = ready + sum(length <= steps for length in lengths)
        rate = answered / (steps * step_cost + answer_cost)
        if rate > best_rate:
            best, best_rate = steps, rate
    waits_for_none = ready / (step_cost + answer_cost)
    return 1 if waits_for_none > best_rate else best


def longest_in_cycles(works: Sequence[Work]) -> int:
    """How many tokens the longest path has that the device writes in cycles, at least 1: such a path is there
    as a whole, or will be, and a request whose path is cut is late for the next cycle.
    """
    return max((work.ahead + 1 for work in works if work.request.drafts_under_way), default=1)


def cap_paths(works: Sequence[Work], ledgers: Mapping[str, Ledger], steps: int, running: int) -> list[Work]:
    """The works with as much of their paths ahead as they get in so many steps; `ledgers` by request,
    `running`: how many requests run.

    Each gets what it wants, if there are as many; and while others write theirs, the guide of an adaptive
    request's words writes on, as far as its tokens may be needed soon and could be paid, were all that run to
    do so.
    """
    return [
        work._replace(ahead=_path_ahead(work, ledgers[work.request.id], steps, running)) for work in works
    ]


def _path_ahead(work: Work, ledger: Ledger, steps: int, running: int) -> int:
    """How many tokens of its path a work gets behind its first row."""
    wanted, request = min(work.ahead, steps - 1), work.request
    if steps == 1 or request.draft_len is not None or request.drafter != "guide" or work.role != "guide":
        return wanted
    if not request.facts.shares_ids or not request.facts.lookahead:
        return wanted
    end = request.context_length(work.role) + request.ahead
    room = min(end, request.max_sequence(work.role)) - work.end
    return max(wanted, min(steps - 1, room, ledger.affordable_rows(work.role, running)))
