"""Which requests the fast path can carry, and what numbers say of them there."""

from __future__ import annotations

from collections.abc import Callable

from nudging.core.block_pool import BlockPool
from nudging.core.request import Request
from nudging.errors import OutOfBlocks

NO_ENDS: frozenset[int] = frozenset()
# As `enum class Writer` counts them.
WRITERS = {"alone": 0, "token": 1, "word": 2}
# The writer's number, threshold, whether equal is unsure, look-ahead.
RuleNumbers = tuple[int, float, bool, int]


def number_of(request: Request) -> int:
    """The request's number: the smaller, the higher its rank."""
    priority, arrival = request.rank
    return (priority << 32) + arrival


def rule_numbers(request: Request) -> RuleNumbers | None:
    """The policy's rule as C++ takes it; None where the fast path cannot carry the request."""
    rule, params = request.facts.rule, request.params
    if rule is None:
        return None
    if params.logprobs is not None or params.chooses_tokens or "\ufffd" in "".join(params.stop):
        return None
    if params.stop and not params.skip_special_tokens:
        # There the text of special tokens is none.
        return None
    if request.drafter == "ngram" and request.draft_len != 0:
        return None
    if rule.writer == "word" and request.tokenizer is None:
        return None
    return WRITERS[rule.writer], rule.threshold, rule.or_equal, rule.lookahead


def ends_of(request: Request, role: str) -> frozenset[int]:
    return NO_ENDS if request.params.ignore_eos else request.roles[role].eos_ids


def face_of(
    pool: BlockPool, lacks: Callable[[OutOfBlocks], None]
) -> tuple[object, object, object, int, bool]:
    """A pool as C++ sees it; `lacks` hears of an allocation that failed."""

    def allocate() -> int:
        try:
            return pool.allocate()
        except OutOfBlocks as error:
            lacks(error)
            return -1

    return allocate, pool.release, lambda: pool.num_available, pool.block_size, pool.prefix_caching
