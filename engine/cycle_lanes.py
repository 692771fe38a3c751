"""A request's part in a cycle of drafting and verifying: who takes part, from where on, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nudging.cycle import TAIL, LaneStart
from nudging.decide import Wanted
from nudging.errors import NumericalError
from nudging.graphs import is_picked_by_head
from nudging.kernels.draft_verify import MAX_DRAFT
from nudging.policies.nudging import Nudging
from nudging.request import Request
from nudging.runner import ModelRunner
from nudging.sequence import Row
from nudging.work import Work

ROLES = ("guide", "base")

Rows = list[Row | NumericalError]


@dataclass(eq=False)
class Lane:
    """A request's part in one cycle.

    `start`: how many tokens its text had when the cycle began, None where that is not known, or nothing
    counts; `before`: the last of them, which the cycle before had foreseen; `lag`: how many tokens of the
    text the guide read; `stopped`: the device writes nothing for it.  `blocks` by role: what it was given.
    Once the cycle is read, `path` are the guide's tokens behind the text, and `rows` by role those from the
    end of the text on.
    """

    request: Request
    preemptions: int
    start: int | None = None
    lag: int = 1
    before: list[int] = field(default_factory=list)
    stopped: bool = False
    blocks: dict[str, list[int]] = field(default_factory=dict)
    path: list[int] = field(default_factory=list)
    rows: dict[str, Rows] = field(default_factory=dict)

    @property
    def is_lost(self) -> bool:
        """Whether the request has given its blocks back since."""
        return self.request.counters.preemptions != self.preemptions

    @property
    def drafts(self) -> int:
        """How many tokens the guide drafts."""
        return cycle_length(self.request, self.start or 0)

    def end(self, role: str) -> int:
        """Where prompt and text of the role end."""
        return len(self.request.prompts[role].ids) + (self.start or 0)

    def reach(self, role: str) -> int:
        """Up to where this cycle and the next one may write."""
        drafts = self.request.draft_len or 0
        return min(self.end(role) + 2 * drafts + 1, self.request.max_sequence(role))

    def answers(self, work: Work) -> Rows | None:
        """The work's rows, where the cycle has computed them over the very tokens and blocks."""
        role, rows = work.role, self.rows.get(work.role, [])
        sequence, end = self.request.sequences[role], self.end(role)
        first, last = work.first_row - end, work.end - end
        read_from = end - (self.lag if role == "guide" else 1)
        if not 0 <= first <= last < len(rows) or work.start < read_from or self.is_lost:
            return None
        size = sequence.block_table.pool.block_size
        # Blocks before those may have been found to be the same as another text's, and given back for it.
        blocks = slice(work.start // size, -(-work.end // size))
        if sequence.block_table.ids[blocks] != self.blocks[role][blocks]:
            return None
        return rows[first : last + 1] if sequence.tokens[end : work.end] == self.path[:last] else None


def is_at_text(lanes: Sequence[Lane]) -> bool:
    """Whether one of a request's cycles begins with its text as it is now."""
    for lane in lanes:
        output, known = lane.request.output, len(lane.before)
        if lane.start == len(output) and output[len(output) - known :] == lane.before and not lane.is_lost:
            return True
    return False


def cycle_length(request: Request, written: int) -> int:
    """How many tokens are drafted behind a text of so many: the base's own last one needs no draft."""
    return min(request.draft_len or 0, request.max_tokens - written - 1)


def begins(work: Work, want: Wanted, runners: Mapping[str, ModelRunner]) -> bool:
    """Whether the work is the guide's first pass of a cycle: of the next draft, behind a text that the base
    has read but for its last token.
    """
    request, policy = work.request, work.request.policy
    if type(policy) is not Nudging or policy.granularity != "token" or policy.threshold > 1:
        return False
    if work.role != "guide" or request.drafter != "guide" or not is_picked_by_head(want):
        return False
    sequences = [request.sequences[role] for role in ROLES]
    if any(s.block_table.pool is not runners[r].pool for s, r in zip(sequences, ROLES, strict=True)):
        return False
    draft, length = request.draft, cycle_length(request, len(request.output))
    if draft is None or draft.tokens or not 0 < length <= MAX_DRAFT:
        return False
    # Behind a text that others go on with nobody may write.
    if request.known_ahead or request.keeps_sequences:
        return False
    # A draft may begin with the token that the guide has to write; see `nudging.draft`.
    led = draft.start - len(request.output)
    guide, base = (request.context_length(role) for role in ROLES)
    return (
        led in (0, 1)
        and draft.length == length - led
        and request.need_now.ahead == length - 1
        and work.end == guide >= TAIL
        and work.end - work.start <= TAIL
        and sequences[1].context_len == base
        and sequences[1].num_computed >= base - 1
    )


def lane_start(work: Work, want: Wanted) -> LaneStart:
    """The text of a work that begins a cycle, for the device."""
    request, policy = work.request, work.request.policy
    assert isinstance(policy, Nudging)
    guide = request.sequences["guide"]
    return LaneStart(
        written=len(request.output),
        room=request.max_tokens - len(request.output),
        before=guide.tokens[work.end - 2],
        last=guide.tokens[work.end - 1],
        lag=work.end - work.start,
        alive=1,
        guide_prompt=len(request.prompts["guide"].ids),
        base_prompt=len(request.prompts["base"].ids),
        drafts=request.draft_len or 0,
        first=request.first_position,
        threshold=policy.threshold,
        or_equal=policy.comparator == "<=",
        ignore_eos=request.params.ignore_eos,
        temperature=request.params.temperature,
        seed=request.seed,
    )


def tables_of(lanes: Sequence[Lane]) -> list[tuple[list[int], list[int]]]:
    """The blocks of each lane, the guide's and the base's; none for those that write nothing."""
    return [([], []) if lane.stopped else (lane.blocks["guide"], lane.blocks["base"]) for lane in lanes]
