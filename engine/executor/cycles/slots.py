"""A request's part in a cycle of drafting and verifying: who takes part, from where on, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nudging.core.request import Request
from nudging.core.rows import Rows
from nudging.core.speculation.ledger import MAX_ADAPTIVE_DRAFT
from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.executor.cuda_graphs import is_picked_by_head
from nudging.executor.cycles.recorded_cycle import TAIL, SlotBlocks, SlotStart
from nudging.kernels.draft_limits import MAX_DRAFT


@dataclass(eq=False)
class Slot:
    """A request's part in one cycle.

    `wanted`: how many tokens the guide drafts for it, where the text has room for so many.  `start`: how many
    tokens its text had when the cycle began, None where that is not known, or nothing counts; `before`: the
    last of them, which the cycle before had foreseen; `lag`: how many tokens of the text the guide read;
    `stopped`: the device writes nothing for it.  `blocks` by role: what it was given, see
    `BlockTable.stamps`.  Once the cycle is
    read, `path` are the guide's tokens behind the text, and `rows` by role those from the end of the text on.
    """

    request: Request
    preemptions: int
    wanted: int
    start: int | None = None
    lag: int = 1
    before: list[int] = field(default_factory=list)
    stopped: bool = False
    blocks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    path: list[int] = field(default_factory=list)
    rows: dict[str, Rows] = field(default_factory=dict)

    @property
    def is_lost(self) -> bool:
        """Whether the request has given its blocks back since."""
        return self.request.counters.preemptions != self.preemptions

    @property
    def drafts(self) -> int:
        """How many tokens the guide drafts: the base's own last one needs no draft."""
        return min(self.wanted, self.request.max_tokens - (self.start or 0) - 1)

    def end(self, role: str) -> int:
        """Where prompt and text of the role end."""
        return len(self.request.prompts[role].ids) + (self.start or 0)

    def reach(self, role: str) -> int:
        """Up to where this cycle and the next one may write."""
        length = self.request.draft_len
        behind = 0 if not self.wanted else MAX_ADAPTIVE_DRAFT if length is None else length
        return min(self.end(role) + self.wanted + behind + 1, self.request.max_sequence(role))

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
        if sequence.block_table.stamps(blocks) != self.blocks[role][blocks]:
            return None
        return rows[first : last + 1] if sequence.tokens[end : work.end] == self.path[:last] else None


def is_at_text(slots: Sequence[Slot]) -> bool:
    """Whether one of a request's cycles begins with its text as it is now."""
    for slot in slots:
        output, known = slot.request.output, len(slot.before)
        if slot.start == len(output) and output[len(output) - known :] == slot.before and not slot.is_lost:
            return True
    return False


def drafts_of(work: Work, want: Wanted, roles: tuple[str, ...]) -> int | None:
    """How many tokens a cycle drafts, if there is room, whose first pass the work may be: the guide's of the
    next draft, or, 0, the pass of a model that writes alone.  None where it is not of a cycle.
    """
    request = work.request
    drafts = _drafts_now(request, work.role, roles)
    if drafts is None or request.need_now.ahead != max(drafts - 1, 0):
        return None
    if not is_picked_by_head(want) or request.known_ahead or request.keeps_sequences:
        # Behind a text that others go on with nobody may write.
        return None
    if work.end != request.context_length(work.role):
        return None
    room = request.max_tokens - len(request.output)
    if drafts and room == 1:
        # The guide's last token needs no base; those who go on are not to begin anew for it.
        return None
    # Near the end of a text the shape of its cycles stays as it is.
    return request.drafts_next if drafts and drafts == min(request.drafts_next, room - 1) else drafts


def begins(work: Work, drafts: int, roles: tuple[str, ...]) -> bool:
    """Whether a cycle may begin with the work: all has been read but for the last of the text.

    The device is told one last token for all roles.  Before the first token of a text it is the prompt's, and
    roles whose prompts end in unlike tokens begin with passes.
    """
    request = work.request
    last = request.sequences[work.role].tokens[work.end - 1]
    for role in roles:
        sequence, end = request.sequences[role], request.context_length(role)
        lag = TAIL if role == work.role and drafts else 1
        if end < TAIL or sequence.context_len != end or sequence.num_computed < end - lag:
            return False
        if sequence.tokens[end - 1] != last:
            return False
    return work.end - work.start <= (TAIL if drafts else 1)


def _drafts_now(request: Request, role: str, roles: tuple[str, ...]) -> int | None:
    """How many tokens a cycle of these roles drafts for the request now; None where it serves none."""
    rule, draft = request.facts.rule, request.draft
    if rule is None:
        return None
    if rule.writer == "alone":
        is_drafted = draft is not None and draft.length > 0
        return None if is_drafted or roles != request.facts.roles else 0
    if rule.writer != "token" or not rule.asks_base:
        return None
    if len(roles) == 1 or role != "guide" or request.drafter != "guide":
        return None
    if draft is None or draft.tokens:
        return None
    # A draft may begin with the token that the guide has to write; see `nudging.core.speculation.drafting`.
    led = draft.start - len(request.output)
    drafts = draft.length + led
    return drafts if led in (0, 1) and 0 < drafts <= MAX_DRAFT else None


def slot_start(work: Work) -> SlotStart:
    """The text of a work that begins a cycle, for the device."""
    request, rule = work.request, work.request.rule
    prompts = {role: len(prompt.ids) for role, prompt in request.prompts.items()}
    tokens = request.sequences[work.role].tokens
    writer = work.role if rule.writer == "alone" else "base"
    return SlotStart(
        written=len(request.output),
        room=request.max_tokens - len(request.output),
        before=tokens[work.end - 2],
        last=tokens[work.end - 1],
        lag=work.end - work.start,
        alive=1,
        guide_prompt=prompts[work.role],
        base_prompt=prompts[writer],
        first=request.first_position,
        threshold=rule.threshold,
        or_equal=rule.or_equal,
        ignore_eos=request.params.ignore_eos,
        temperature=request.params.temperature,
        seed=request.seed,
    )


def blocks_of(slots: Sequence[Slot], roles: Sequence[str]) -> list[SlotBlocks]:
    """What each slot gets of the models of these roles, the writer's last; none if it writes nothing."""

    def of(slot: Slot) -> SlotBlocks:
        *guide, base = ([block for block, _ in slot.blocks[role]] for role in roles)
        return SlotBlocks(slot.wanted, guide[0] if guide else (), base)

    return [SlotBlocks() if slot.stopped else of(slot) for slot in slots]
