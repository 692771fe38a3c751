"""Cycles of drafting and verifying that the device runs ahead of the host.

The device goes from one cycle straight to the next (`recorded_cycle`); the host starts each one before it
looks at what the last one said, so that the device never waits for it.  What a cycle said are rows like any
others: where the engine asks for rows that a cycle has computed, they are handed out, and the policy decides
from them.  So what the device has decided is a overlap only: where the policy decides otherwise, where a
text ends, a request comes or blocks are missing, the next cycle starts from the host's texts again.

One thing must hold: the cycle that is under way writes into the cache behind the text that the device
foresaw.  Therefore rows are handed out only where that text is what the policy's own replay of them gives;
otherwise ordinary passes compute them again, over whatever was written meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from nudging.core.request import Request
from nudging.core.rows import Rows
from nudging.core.speculation.pass_costs import CycleTime
from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.errors import OutOfBlocks
from nudging.executor.cuda_graphs import SIZES, WIDTHS, Recorder, at_least
from nudging.executor.cycles.cycle_cache import CycleCache
from nudging.executor.cycles.recorded_cycle import (
    TAIL,
    CycleShape,
    Model,
    RecordedCycle,
    Said,
    SlotStart,
    Told,
)
from nudging.executor.cycles.slots import Slot, begins, blocks_of, drafts_of, is_at_text, slot_start
from nudging.executor.model_runner import ModelRunner
from nudging.executor.sampler import row_of
from nudging.kernels.cycle_rows import ALIVE, LAG, LAST, WRITTEN
from nudging.kernels.draft_limits import MAX_DRAFT
from nudging.kernels.draft_verify import BASE_EOS, GUIDE_EOS, replay

# Requests that stand where a cycle begins: how many drafts each wants, and the work that it begins with.
Starts = dict[Request, tuple[int, Work]]


@dataclass
class Flight:
    """A cycle under way; `said` waits for it."""

    recorded: RecordedCycle
    slots: list[Slot]
    said: Callable[[], Said]
    # Whether it was started while another one was under way.
    is_behind: bool

    def __post_init__(self) -> None:
        self.requests = {slot.request for slot in self.slots}


class Overlap:
    """The cycles of a base and its guide, or of one model alone, and what they have computed for whom.

    It serves token-level nudging with the guide's drafts, or a model that writes alone, where the head picks
    the tokens.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        ends: Mapping[str, Collection[int]],
        vocab_size: int,
        recorder: Recorder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`runners` by role: the guide's and the base's, or that of the model that writes alone; `ends`: the
        ids that end a text, by role; `vocab_size`: how many ids all of them know; `clock`: the seconds of
        now.
        """
        self._clock = clock
        self._runners = runners
        self._first, self._writer = next(iter(runners.values())), list(runners)[-1]
        self._marked = self._mark_ends(ends, vocab_size)
        marks = torch.tensor(self._marked, dtype=torch.uint8, device=self._first.decoder.device)
        *guide, base = (Model(runner.decoder, runner.cache) for runner in runners.values())
        self._cycles = CycleCache(guide[0] if guide else None, base, len(marks), marks, recorder)
        self._flight: Flight | None = None
        # When the device went from one cycle to the next, None where it did something else; and what that
        # one took.
        self._turned_at: float | None = None
        self._time: CycleTime | None = None
        # Those who drafted when it last was asked.
        self._in_step: set[Request] = set()
        # The last cycles of each request that were read.
        self._slots: dict[Request, list[Slot]] = {}

    def rows(
        self, runner: ModelRunner, works: Sequence[Work], wanted: Sequence[Wanted]
    ) -> tuple[list[Rows | None], Set[Request]]:
        """For each of the runner's works its rows, None where they have to be computed; and the requests
        whose works are not to be computed now: they are planned again in the next step.
        """
        late: set[Request] = set()
        if runner is self._first and not all(work.is_onward for work in works):
            drafting = self._drafting(works, wanted)
            roles = tuple(self._runners)
            starts = {
                r: (drafts, work) for r, (drafts, work) in drafting.items() if begins(work, drafts, roles)
            }
            late |= self._turn(starts)
            self._keep_in_step(drafting)
        found = [self._answers(work) for work in works]
        for work, rows in zip(works, found, strict=True):
            if rows is None and work.request not in late and not self._give_up(work):
                late.add(work.request)
        return found, late

    def record_ahead(self, texts: int) -> bool:
        """Record one more cycle of so many texts that may come; False where none is left."""
        # Nobody runs: what is still on its way will not be read.
        self._flight = None
        return self._cycles.record_ahead(texts, self._by_side(self._max_blocks))

    def take_time(self) -> CycleTime | None:
        """What the last cycle took, once."""
        taken, self._time = self._time, None
        return taken

    @property
    def is_under_way(self) -> bool:
        """Whether a cycle is, that somebody waits for."""
        flight = self._flight
        return flight is not None and not all(slot.request.is_finished for slot in flight.slots)

    def disturb(self) -> None:
        """The device does something else, too."""
        self._turned_at = None

    def close(self) -> None:
        """Wait for the cycles that are under way, and forget all of them."""
        self._cycles.close()
        self._flight = None
        self._slots.clear()
        self._in_step.clear()

    def _answers(self, work: Work) -> Rows | None:
        for slot in self._slots.get(work.request, ()):
            rows = slot.answers(work)
            if rows is not None:
                return rows
        return None

    def _give_up(self, work: Work) -> bool:
        """Ordinary passes go on for the request: what later cycles wrote for it is written over.

        A cycle that begins behind the text of the request, as the device foresaw more of it than the policy
        has decided yet, has written over what passes would read from its beginning on: that is to be computed
        again.  Returns whether the work begins before that; else it has to be planned anew.
        """
        request = work.request
        slots = self._slots.pop(request, [])
        if self._flight is not None and request in self._flight.requests:
            slots += [slot for slot in self._flight.slots if slot.request is request]
        begins = True
        for slot in slots:
            if slot.start is not None and slot.start > len(request.output) and not slot.is_lost:
                begins &= work.start <= slot.end(work.role) - TAIL
                for role in self._runners:
                    request.sequences[role].uncompute(slot.end(role) - TAIL)
            slot.start = None
        return begins

    def _drafting(self, works: Sequence[Work], wanted: Sequence[Wanted]) -> Starts:
        """Those who stand where a cycle begins, or would, had their prompts been read."""
        found, at = {}, 0
        for work in works:
            if work.first_row == work.end and work.role in self._runners:
                drafts = drafts_of(work, wanted[at], tuple(self._runners))
                if drafts is not None:
                    found[work.request] = drafts, work
            at += max(work.end - work.first_row + 1, 0)
        return found

    def _turn(self, starts: Starts) -> Set[Request]:
        """Read the cycle that these texts begin with, once the next one is on its way.

        Returns those that stood at the start of a cycle while the one under way was of others: they wait,
        and all begin with the next one.
        """
        # A cycle before the last one may still be asked for by those who were answered in part.
        self._slots = {r: slots[-2:] for r, slots in self._slots.items() if not r.is_finished}
        starts = {r: start for r, start in starts.items() if not is_at_text(self._slots.get(r, []))}
        late: Set[Request] = frozenset()
        if not starts:
            return late
        before, self._flight = self._flight, None
        flight = before if before and self._ready(before, starts) else self._start(starts)
        if flight is not None:
            ready = self._ready(flight, starts)
            others = [slot for slot in flight.slots if slot.request not in ready and not slot.stopped]
            if len(ready) == len(starts) and not others:
                self._flight = self._go_on(flight)
            elif ready and flight is before:
                # A pass of their own would take as long as the cycle that they can have with the others.
                late = starts.keys() - ready - flight.requests
            self._land(flight, self._flight)
        for old in filter(None, (before, flight)):
            self._let_go(old)
        return late

    def _ready(self, flight: Flight, starts: Starts) -> set[Request]:
        """Those whose next cycle this is."""
        return {slot.request for slot in flight.slots if slot.request in starts and is_at_text([slot])}

    def _start(self, starts: Starts) -> Flight | None:
        """A cycle from these texts on; None where its shape is new or blocks are missing: then single passes
        do it.
        """
        texts = [slot_start(work) for _, work in starts.values()]
        slots = [
            Slot(request, request.counters.preemptions, drafts, text.written, text.lag)
            for (request, (drafts, _)), text in zip(starts.items(), texts, strict=True)
        ]
        shape = self._shape(slots, slots)
        if shape is None:
            return None
        recorded = self._cycles.find(shape)
        if recorded is None or not self._own_blocks(slots):
            return None
        return self._launch(recorded, slots, texts)

    def _launch(
        self, recorded: RecordedCycle, slots: list[Slot], texts: Sequence[SlotStart] | None
    ) -> Flight:
        """Send a cycle on its way, from these texts or from where the one before leaves them."""
        for slot in slots:
            slot.request.drafts_under_way = slot.wanted
        said = recorded.start(blocks_of(slots, list(self._runners)), texts)
        return Flight(recorded, slots, said, texts is None)

    def _by_side(self, of: Callable[[str], int]) -> tuple[int, int]:
        """Something of the guide and of the base; 0 where nobody drafts."""
        *guide, base = map(of, self._runners)
        return (guide[0] if guide else 0), base

    def _max_blocks(self, role: str) -> int:
        """How many blocks a text of the role takes at most, with what a cycle may write behind it."""
        runner = self._runners[role]
        size = runner.pool.block_size
        return min(-(-(runner.decoder.config.max_len + 2 * MAX_DRAFT + 1) // size), runner.pool.total)

    def _go_on(self, flight: Flight) -> Flight | None:
        """The cycle behind one that is not read yet; None where blocks are missing, somebody wants no draft
        any more, or it needs a shape that is not recorded.
        """
        going = [slot for slot in flight.slots if not slot.stopped]
        if any(slot.wanted and not slot.request.drafts_next for slot in going):
            return None
        had = tuple(slot.wanted for slot in flight.slots)
        wishes = tuple(
            slot.request.drafts_next if slot.wanted and not slot.stopped else 0 for slot in flight.slots
        )
        # As many drafts as each wants now; where that is not recorded yet, as many as it had.
        for lengths in dict.fromkeys((wishes, had)):
            slots = [
                Slot(slot.request, slot.preemptions, wanted, stopped=slot.stopped, blocks=slot.blocks)
                for slot, wanted in zip(flight.slots, lengths, strict=True)
            ]
            shape, known = self._shape(flight.slots, slots), flight.recorded.shape
            recorded = self._cycles.find_onward(shape, known) if shape else None
            if recorded is not None:
                return self._launch(recorded, slots, None) if self._own_blocks(going) else None
            if shape is None or self._cycles.is_due(shape, known):
                break
        return None

    def _own_blocks(self, slots: Sequence[Slot]) -> bool:
        """Own, alone, all that this cycle and the next one may write."""
        for slot in slots:
            for role, runner in self._runners.items():
                sequence = slot.request.sequences[role]
                try:
                    copies = sequence.prepare_write(sequence.num_computed, slot.reach(role))
                except OutOfBlocks:
                    return False
                runner.cache.copy_blocks(copies)
                sequence.reserved = slot.reach(role)
                slot.blocks[role] = sequence.block_table.stamps()
        return True

    def _let_go(self, flight: Flight) -> None:
        """Keep no blocks for those who are in no cycle any more."""
        staying = set() if self._flight is None else self._flight.requests
        for slot in flight.slots:
            if slot.request not in staying:
                slot.request.drafts_under_way = 0
                for role in self._runners:
                    slot.request.sequences[role].reserved = 0

    def _keep_in_step(self, drafting: Starts) -> None:
        """Let requests that draft do so as if they were in a cycle, so that the next one can begin with all
        of them: a request that first lets the guide write one token alone is late by as much.
        """
        flying = self._flight.requests if self._flight is not None else set()
        for request in self._in_step - drafting.keys() - flying:
            request.drafts_under_way = 0
        for request in drafting.keys() - flying:
            request.drafts_under_way = drafting[request][0]
        self._in_step = set(drafting)

    def _shape(self, texts: Sequence[Slot], slots: Sequence[Slot]) -> CycleShape | None:
        """The smallest shape with a recording that holds the slots, which begin where the cycle of `texts`
        does or ends; None where there is none.
        """
        drafts = max(slot.wanted for slot in slots)
        size = self._first.pool.block_size
        # Rows that do not count stand as far behind the text as those that do.
        reach = max(slot.wanted for slot in texts) + drafts + 1
        if len(slots) * (drafts + 1) > SIZES[-1]:
            return None

        def width(role: str) -> int:
            return max(-(-(slot.end(role) + reach) // size) for slot in texts)

        widths = self._by_side(width)
        if max(widths) > WIDTHS[-1]:
            return None
        sizes = (at_least(WIDTHS, max(w, drafts + 1)) if w else 0 for w in widths)
        return CycleShape(at_least(SIZES, len(slots)), drafts, *sizes)

    def _mark_ends(self, ends: Mapping[str, Collection[int]], vocab_size: int) -> list[int]:
        """Which ids end a text, and whose; see `draft_verify`."""
        marks = [0] * vocab_size
        for role in self._runners:
            for token in ends[role]:
                if token < vocab_size:
                    marks[token] |= BASE_EOS if role == self._writer else GUIDE_EOS
        return marks

    def _land(self, flight: Flight, onward: Flight | None) -> None:
        """Wait for a cycle and take over its rows; now it is known where the one behind it begins."""
        said = flight.said()
        self._time_of(flight)
        for index, slot in enumerate(flight.slots):
            if slot.start is None:
                continue
            first = index * (flight.recorded.shape.drafts + 1)
            guide = [rows[index] for rows in said.guide[: slot.drafts]]
            base = said.base[first : first + slot.drafts + 1]
            slot.path = [token for token, *_ in guide]
            slot.rows = {"guide": [row_of(*one) for one in guide]} if guide else {}
            slot.rows[self._writer] = [row_of(*one) for one in base]
            written, last, is_on = (said.state[index][i] for i in (WRITTEN, LAST, ALIVE))
            foreseen = self._replayed(slot, base) if is_on else []
            if is_on and (written != slot.start + len(foreseen) or last != foreseen[-1]):
                # What the device writes now is not behind the text: nothing of this can be kept.
                slot.rows = {}
            elif onward is not None:
                behind = onward.slots[index]
                behind.stopped = not is_on
                if is_on:
                    behind.start, behind.lag, behind.before = written, said.state[index][LAG], foreseen
            self._slots.setdefault(slot.request, []).append(slot)

    def _time_of(self, flight: Flight) -> None:
        """Note what a cycle took that has just ended, if the device began it when the one before ended."""
        before, self._turned_at = self._turned_at, self._clock()
        if before is None or not flight.is_behind:
            return
        shape = flight.recorded.shape
        passes = dict.fromkeys(self._runners, (shape.drafts, shape.slots))
        passes[self._writer] = 1, shape.slots * (shape.drafts + 1)
        self._time = CycleTime(passes, self._turned_at - before)

    def _replayed(self, slot: Slot, base: Sequence[Told]) -> list[int]:
        """What the policy writes in this cycle, by the rows that were read."""
        request, rule = slot.request, slot.request.rule
        written, _ = replay(
            [(top, lse, token) for token, _, top, lse in base],
            slot.path,
            self._marked,
            rule.threshold,
            rule.or_equal,
            False,
            request.params.ignore_eos,
            request.max_tokens - (slot.start or 0),
        )
        return [token for token, _ in written]
