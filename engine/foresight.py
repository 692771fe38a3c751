"""Cycles of drafting and verifying that the device runs ahead of the host.

The device goes from one cycle straight to the next (`nudging.cycle`); the host starts each one before it
looks at what the last one said, so that the device never waits for it.  What a cycle said are rows like any
others: where the engine asks for rows that a cycle has computed, they are handed out, and the policy decides
from them.  So what the device has decided is a foresight only: where the policy decides otherwise, where a
text ends, a request comes or blocks are missing, the next cycle starts from the host's texts again.

One thing must hold: the cycle that is under way writes into the cache behind the text that the device
foresaw.  Therefore rows are handed out only where that text is what the policy's own replay of them gives;
otherwise ordinary passes compute them again, over whatever was written meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from nudging.cycle import TAIL, CycleShape, LaneStart, Model, RecordedCycle, Said, Told
from nudging.cycle_lanes import ROLES, Lane, Rows, begins, is_at_text, lane_start, tables_of
from nudging.decide import Wanted, row_of
from nudging.errors import OutOfBlocks
from nudging.graphs import SIZES, WIDTHS, Recorder, at_least
from nudging.kernels.cycle_rows import ALIVE, LAG, LAST, WRITTEN
from nudging.kernels.draft_verify import BASE_EOS, GUIDE_EOS, MAX_DRAFT, replay
from nudging.policies.nudging import Nudging
from nudging.record_ahead import MAX_AHEAD, widths
from nudging.request import Request
from nudging.roles import Role
from nudging.runner import ModelRunner
from nudging.work import Work


@dataclass
class Flight:
    """A cycle under way; `said` waits for it."""

    recorded: RecordedCycle
    lanes: list[Lane]
    said: Callable[[], Said]


class Foresight:
    """The cycles of one base and its guide, and what they have computed for whom.

    It serves token-level nudging with drafts of the guide of a fixed length, where the head picks the tokens.
    """

    def __init__(
        self, guide: ModelRunner, base: ModelRunner, roles: Mapping[str, Role], recorder: Recorder
    ) -> None:
        self._runners = {"guide": guide, "base": base}
        self._recorder = recorder
        self._recorded: dict[CycleShape, RecordedCycle] = {}
        self._seen: set[CycleShape] = set()
        # What came: drafts and widths; and how many recordings were made ahead.
        self._families: set[tuple[int, int, int]] = set()
        self._ahead = 0
        self._vocab = min(roles[role].vocab_size for role in ROLES)
        self._marked = self._mark_ends(roles)
        self._marks = torch.tensor(self._marked, dtype=torch.uint8, device=base.decoder.device)
        self._flight: Flight | None = None
        # The last cycles of each request that were read.
        self._lanes: dict[Request, list[Lane]] = {}

    def rows(self, runner: ModelRunner, works: Sequence[Work], wanted: Sequence[Wanted]) -> list[Rows | None]:
        """For each of the runner's works its rows, None where they have to be computed."""
        if runner is self._runners["guide"]:
            self._turn(self._beginning(works, wanted))
        found = [self._answers(work) for work in works]
        for work, rows in zip(works, found, strict=True):
            if rows is None:
                self._give_up(work)
        return found

    def record_ahead(self, texts: int) -> bool:
        """Record one more cycle of so many texts that may come; False where none is left."""
        if self._ahead == MAX_AHEAD or not self._recorder.has_room():
            return False
        lanes, limits = at_least(SIZES, texts), [self._max_blocks(role) for role in ROLES]
        for drafts, *seen in sorted(self._families):
            for both in product(*map(widths, seen, limits)):
                shape = CycleShape(lanes, drafts, *both)
                if shape not in self._recorded and texts * (drafts + 1) <= SIZES[-1]:
                    self._ahead += 1
                    self._record(shape)
                    return True
        return False

    def close(self) -> None:
        """Wait for the cycles that are under way, and forget all of them."""
        for recorded in self._recorded.values():
            recorded.finish()
        self._flight = None
        self._lanes.clear()
        self._recorded.clear()

    def _answers(self, work: Work) -> Rows | None:
        answers = (lane.answers(work) for lane in self._lanes.get(work.request, []))
        return next((rows for rows in answers if rows is not None), None)

    def _give_up(self, work: Work) -> None:
        """Ordinary passes go on for the request: what later cycles wrote for it is written over.

        That is sound where they do not read what a later cycle has written over: its text is that of the
        request, or lies behind the work.
        """
        request = work.request
        lanes = self._lanes.pop(request, [])
        if self._flight is not None:
            lanes += [lane for lane in self._flight.lanes if lane.request is request]
        for lane in [lane for lane in lanes if not lane.is_lost]:
            is_behind = work.start <= lane.end(work.role) - TAIL
            assert lane.start is None or lane.start <= len(request.output) or is_behind, (
                f"{work.role} of {request.id} goes on from {work.start} in the middle of a cycle"
            )
        for lane in lanes:
            lane.start = None

    def _beginning(self, works: Sequence[Work], wanted: Sequence[Wanted]) -> dict[Request, LaneStart]:
        """Those who stand where a cycle begins."""
        found, at = {}, 0
        for work in works:
            if work.first_row == work.end and begins(work, wanted[at], self._runners):
                found[work.request] = lane_start(work, wanted[at])
            at += max(work.end - work.first_row + 1, 0)
        return found

    def _turn(self, starts: dict[Request, LaneStart]) -> None:
        """Read the cycle that these texts begin with, once the next one is on its way."""
        # A cycle before the last one may still be asked for by those who were answered in part.
        self._lanes = {r: lanes[-2:] for r, lanes in self._lanes.items() if not r.is_finished}
        starts = {r: start for r, start in starts.items() if not is_at_text(self._lanes.get(r, []))}
        if not starts:
            return
        before, self._flight = self._flight, None
        flight = before if before and self._ready(before, starts) else self._start(starts)
        if flight is not None:
            ready = self._ready(flight, starts)
            others = [lane for lane in flight.lanes if lane.request not in ready and not lane.stopped]
            if len(ready) == len(starts) and not others:
                self._flight = self._go_on(flight)
            self._land(flight, self._flight)
        for old in filter(None, (before, flight)):
            self._let_go(old)

    def _ready(self, flight: Flight, starts: Mapping[Request, LaneStart]) -> set[Request]:
        """Those whose next cycle this is."""
        return {lane.request for lane in flight.lanes if lane.request in starts and is_at_text([lane])}

    def _start(self, starts: dict[Request, LaneStart]) -> Flight | None:
        """A cycle from these texts on; None where its shape is new or blocks are missing: then single passes
        do it.
        """
        lanes = [
            Lane(request, request.counters.preemptions, start.written, start.lag)
            for request, start in starts.items()
        ]
        shape = self._shape(lanes)
        if shape is None:
            return None
        recorded = self._find(shape)
        if recorded is None or not self._own_blocks(lanes):
            return None
        return Flight(recorded, lanes, recorded.start(tables_of(lanes), list(starts.values())))

    def _find(self, shape: CycleShape) -> RecordedCycle | None:
        """A recording for the shape.  Recording takes time: where the shape is new, one for a few more lanes
        does, and where there is none, None.
        """
        self._families.add(shape[1:])
        if shape not in self._recorded and shape not in self._seen:
            self._seen.add(shape)
            fitting = [
                known
                for known in self._recorded
                if shape.lanes <= known.lanes <= 2 * shape.lanes and shape[1:] == known[1:]
            ]
            return self._recorded[min(fitting)] if fitting else None
        return self._recorded.get(shape) or self._record(shape)

    def _record(self, shape: CycleShape) -> RecordedCycle:
        guide, base = (Model(self._runners[r].decoder, self._runners[r].cache) for r in ROLES)
        recorded = RecordedCycle(guide, base, shape, self._vocab, self._marks, self._recorder)
        self._recorded[shape] = recorded
        return recorded

    def _max_blocks(self, role: str) -> int:
        """How many blocks a text of the role takes at most, with what a cycle may write behind it."""
        runner = self._runners[role]
        size = runner.pool.block_size
        return min(-(-(runner.decoder.config.max_len + 2 * MAX_DRAFT + 1) // size), runner.pool.total)

    def _go_on(self, flight: Flight) -> Flight | None:
        """The cycle behind one that is not read yet; None where blocks are missing or it needs another
        shape.
        """
        shape = self._shape(flight.lanes)
        is_larger = shape is None or any(a > b for a, b in zip(shape, flight.recorded.shape, strict=True))
        if is_larger or not self._own_blocks([lane for lane in flight.lanes if not lane.stopped]):
            return None
        lanes = [
            Lane(lane.request, lane.preemptions, stopped=lane.stopped, blocks=lane.blocks)
            for lane in flight.lanes
        ]
        return Flight(flight.recorded, lanes, flight.recorded.start(tables_of(lanes)))

    def _own_blocks(self, lanes: Sequence[Lane]) -> bool:
        """Own, alone, all that this cycle and the next one may write."""
        for lane in lanes:
            for role in ROLES:
                sequence, runner = lane.request.sequences[role], self._runners[role]
                try:
                    copies = sequence.prepare_write(sequence.num_computed, lane.reach(role))
                except OutOfBlocks:
                    return False
                runner.cache.copy_blocks(copies)
                sequence.reserved = lane.reach(role)
                lane.blocks[role] = list(sequence.block_table.ids)
        return True

    def _let_go(self, flight: Flight) -> None:
        """Keep no blocks for those who are in no cycle any more."""
        staying = set() if self._flight is None else {lane.request for lane in self._flight.lanes}
        for lane in flight.lanes:
            if lane.request not in staying:
                for role in ROLES:
                    lane.request.sequences[role].reserved = 0

    def _shape(self, lanes: Sequence[Lane]) -> CycleShape | None:
        """The smallest shape with a recording that holds the lanes; None where there is none."""
        drafts = max(lane.request.draft_len or 0 for lane in lanes)
        size = self._runners["base"].pool.block_size
        # Rows that do not count stand as far behind the text as those that do.
        widths = [max(-(-(lane.end(role) + 2 * drafts + 1) // size) for lane in lanes) for role in ROLES]
        if len(lanes) * (drafts + 1) > SIZES[-1] or max(widths) > WIDTHS[-1]:
            return None
        return CycleShape(
            at_least(SIZES, len(lanes)), drafts, *(at_least(WIDTHS, max(w, drafts + 1)) for w in widths)
        )

    def _mark_ends(self, roles: Mapping[str, Role]) -> list[int]:
        """Which ids end a text, and whose; see `draft_verify`."""
        marks = [0] * self._vocab
        for role, bit in (("base", BASE_EOS), ("guide", GUIDE_EOS)):
            for token in roles[role].eos_ids:
                if token < self._vocab:
                    marks[token] |= bit
        return marks

    def _land(self, flight: Flight, onward: Flight | None) -> None:
        """Wait for a cycle and take over its rows; now it is known where the one behind it begins."""
        said = flight.said()
        for index, lane in enumerate(flight.lanes):
            if lane.start is None:
                continue
            first = index * (flight.recorded.shape.drafts + 1)
            guide = [rows[index] for rows in said.guide[: lane.drafts]]
            base = said.base[first : first + lane.drafts + 1]
            lane.path = [token for token, *_ in guide]
            lane.rows = {"guide": [row_of(*one) for one in guide], "base": [row_of(*one) for one in base]}
            written, last, is_on = (said.state[index][i] for i in (WRITTEN, LAST, ALIVE))
            foreseen = self._replayed(lane, base) if is_on else []
            if is_on and (written != lane.start + len(foreseen) or last != foreseen[-1]):
                # What the device writes now is not behind the text: nothing of this can be kept.
                lane.rows = {}
            elif onward is not None:
                behind = onward.lanes[index]
                behind.stopped = not is_on
                if is_on:
                    behind.start, behind.lag, behind.before = written, said.state[index][LAG], foreseen
            self._lanes.setdefault(lane.request, []).append(lane)

    def _replayed(self, lane: Lane, base: Sequence[Told]) -> list[int]:
        """What the policy writes in this cycle, by the rows that were read."""
        policy, request = lane.request.policy, lane.request
        assert isinstance(policy, Nudging)
        written, _ = replay(
            [(top, lse, token) for token, _, top, lse in base],
            lane.path,
            self._marked,
            policy.threshold,
            policy.comparator == "<=",
            False,
            request.params.ignore_eos,
            request.max_tokens - (lane.start or 0),
        )
        return [token for token, _ in written]
