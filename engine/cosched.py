"""In which order models run, and how far a path is written on before the dearest model answers everyone.

A pass of a large model costs nearly the same for one request as for many: requests that could be answered
together and are not cost a pass each.  So within a step the cheaper models go first, with a request's whole
path at once (a draft, the guide's next word), and the dearest model then answers all that have come to need
it.  Not at any price: those that are ready do not wait for a path longer than it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nudging.adaptive import Costs


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
