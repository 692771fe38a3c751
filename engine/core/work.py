"""What a model is to compute in a step, as the scheduler says it and the runner reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nudging.core.request import Request


class Work(NamedTuple):
    """Compute `tokens[start:end]` of one sequence; return the rows after `tokens[:p]` for p in
    first_row..end.  Of the path behind them, `ahead` tokens are still wanted; `is_onward`: it is the next
    token of such a path.

    `copies` are the (source, destination) blocks to copy before: those it writes and shares with others.
    """

    request: Request
    role: str
    start: int
    end: int
    first_row: int
    ahead: int = 0
    copies: tuple[tuple[int, int], ...] = ()
    is_onward: bool = False

    @property
    def answers(self) -> int:
        """How many rows it returns: none, where a part of a prompt is read."""
        return max(self.end - self.first_row + 1, 0)


@dataclass(frozen=True)
class Found:
    """`tokens[start:end]` of one sequence need not be computed: a sibling or an earlier request had them."""

    request: Request
    role: str
    start: int
    end: int


@dataclass(frozen=True)
class SchedulerOutput:
    """The work of one model; what was found since the last plan; and who had to give its blocks back."""

    works: list[Work]
    found: list[Found]
    preempted: list[Request]


def describe(works: list[Work], rows: int, carried: Mapping[str, Any]) -> dict[str, Any]:
    """A pass for the timeline: its rows in all, and for each request which tokens of which role it reads and
    how many rows it answers.  `rows`: in all; `carried`: what is told of requests that the works lack.
    """
    reads = {
        f"{work.request.id} {work.role}": f"{work.start}:{work.end}, {work.answers} answers" for work in works
    }
    return {"rows": rows, **carried, **reads}
