"""Requests in the order of their ranks."""

from __future__ import annotations

from bisect import bisect_left, insort

from nudging.core.request import Request


class Ranked(list[Request]):
    """Requests, the highest-ranked first; no two have one rank.

    Whether one is there, and where, takes the logarithm of how many there are, not a look at each.
    """

    def add(self, request: Request) -> None:
        insort(self, request, key=_rank)

    def remove(self, request: Request) -> None:
        """Take out a request that is there."""
        at = self.num_above(request)
        assert self[at] is request, f"{request.id} is not among those of its rank"
        del self[at]

    def num_above(self, request: Request) -> int:
        """How many rank above `request`, be it here or not."""
        return bisect_left(self, request.rank, key=_rank)

    def __contains__(self, request: object) -> bool:
        if not isinstance(request, Request):
            return False
        at = self.num_above(request)
        return at < len(self) and self[at] is request


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
