"""A whole cycle of drafting and verifying, for many texts at once, as one recording.

The guide writes its drafts, the base reads them, the policy is replayed over what both said (`draft_verify`),
and the device itself knows where each text stands then: the next cycle can be started before anybody has
looked at what this one said.  The host only says which blocks the texts own and how many drafts they get.
Without a guide nothing is drafted, and a cycle is the next token of each text.

What the device decides is no text: it foresees what the policy will decide from the same rows; see
`nudging.executor.cycles.overlap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from nudging.executor.cuda_graphs import Picks, Recorder, answer, read
from nudging.kernels.cycle_advance import cycle_advance
from nudging.kernels.cycle_rows import STATES, CycleRows, cycle_rows
from nudging.kernels.draft_limits import MAX_DRAFT
from nudging.kernels.draft_verify import draft_verify
from nudging.kernels.lm_head import LINES, MAX, TOKEN
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache

# So many tokens of a text the guide's first pass reads, at most.
TAIL = 2
# A field's dtype and shape.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Views = Mapping[str, Tensor]
# The token picked, the likeliest one, max and lse of a row; see `nudging.executor.cuda_graphs.read`.
Told = tuple[int, int, float, float]


class CycleShape(NamedTuple):
    """What a cycle is recorded for: slots, drafts of each, and entries of the models' block tables.

    Where nobody drafts, `drafts` and `guide_width` are 0.
    """

    slots: int
    drafts: int
    guide_width: int
    base_width: int


class Model(NamedTuple):
    """One model of a cycle with its cache."""

    decoder: Decoder
    cache: KVCache


class SlotStart(NamedTuple):
    """A text and its request, as a cycle needs to know them; see `cycle_rows` and `draft_verify`.

    The first six are a column of the cycle's `state`, in its order; `seed` is any 64-bit number.
    """

    written: int
    room: int
    before: int
    last: int
    lag: int
    alive: int
    guide_prompt: int
    base_prompt: int
    first: int
    threshold: float
    or_equal: bool
    ignore_eos: bool
    temperature: float
    seed: int


class SlotBlocks(NamedTuple):
    """What a slot gets in one cycle: how many drafts, and the blocks of its guide and its base, which have to
    hold all that the cycle may write.
    """

    drafts: int = 0
    guide: Sequence[int] = ()
    base: Sequence[int] = ()


class Said(NamedTuple):
    """What a cycle said: the guide's rows pass by pass, the base's slot by slot, and the slots' states."""

    guide: list[list[Told]]
    base: list[Told]
    state: list[list[int]]


class Side:
    """What the host writes for every other cycle and reads of it, in memory that copies do not wait for."""

    def __init__(self, shapes: Sequence[Tensor], pinned: bool) -> None:
        """`shapes`: the device's slots, tables and result."""
        self.slots, self.tables, self.result = (
            torch.zeros(like.shape, dtype=like.dtype, pin_memory=pinned) for like in shapes
        )
        # Waits for the cycle that was started with it last.
        self.wait: Callable[[], None] | None = None

    def finish(self) -> None:
        if self.wait is not None:
            self.wait()
            self.wait = None


class RecordedCycle:
    """One recording of a whole cycle.

    Two cycles may be on their way at once: what the host writes for one and reads of it is not the other's.
    What the device keeps of the texts is shared by all cycles of so many slots: each goes on where the one
    before it, of however many drafts, has left them.
    """

    def __init__(
        self,
        guide: Model | None,
        base: Model,
        shape: CycleShape,
        vocab: int,
        marks: Tensor,
        memory: Tensor,
        recorder: Recorder,
    ) -> None:
        """`vocab`: how many ids both models know; `marks`: [vocab] uint8, on the device, see `draft_verify`;
        `memory`: see `cycle_memory`.  What a cycle that shares it may still be doing is not read any more.
        """
        self.shape = shape
        self._guide, self._base, self._vocab, self._marks = guide, base, vocab, marks
        self._recorder = recorder
        device = base.decoder.device
        slots, drafts = shape.slots, shape.drafts
        self._layouts = _slots_layout(slots), _tables_layout(shape), _result_layout(slots, drafts)
        slots_bytes, tables_bytes, result_bytes = map(_num_bytes, self._layouts)
        # What is written for a cycle ends with the states of the texts, what is read of it begins with them.
        state_at = _state_at(slots)
        self._slot_memory, self._result = memory[:slots_bytes], memory[state_at : state_at + result_bytes]
        self._table_memory = torch.zeros(tables_bytes, dtype=torch.uint8, device=device)
        self._slots, self._tables, said = map(
            _views, (self._slot_memory, self._table_memory, self._result), self._layouts
        )
        self._guide_said, self._base_said = said["guide"], said["base"]
        parts = self._slot_memory, self._table_memory, self._result
        self._sides = [Side(parts, device.type == "cuda") for _ in range(2)]
        each = torch.arange(slots + 1, dtype=torch.int32, device=device)
        # Where a slot's rows begin in the guide's first pass, in its further ones and in the base's.
        self._begins = each * 2, each, each * (drafts + 1)
        rows = torch.arange(slots * (drafts + 1), device=device)
        self._answers = each[:-1].long() * 2 + 1, each[:-1].long(), rows
        self._by_word = torch.zeros(slots, dtype=torch.bool, device=device)
        # No slot takes part: running it changes nothing.
        memory.zero_()
        self.replay = recorder.record(self._run)

    def start(
        self, blocks: Sequence[SlotBlocks], slots: Sequence[SlotStart] | None = None
    ) -> Callable[[], Said]:
        """Start a cycle and return what waits for it and reads it.

        slots: the texts to start with; None goes on from where the cycle before, of as many slots, left them.
        """
        self._sides.reverse()
        side = self._sides[0]
        # A caller that has not read what it was used for has to wait now, before it is overwritten.
        side.finish()
        self._fill_tables(_views(side.tables, self._layouts[1]), blocks)
        if slots is not None:
            self._fill_slots(_views(side.slots, self._layouts[0]), slots)
        self._launch(side, slots is not None)
        side.wait = self._recorder.mark()

        def said() -> Said:
            side.finish()
            result = _views(side.result, self._layouts[2])
            passes = result["guide"].unbind(1)[TAIL:]
            rows = [list(zip(*read(one), strict=True)) for one in (*passes, result["base"])]
            return Said(rows[:-1], rows[-1], result["state"].T.tolist())

        return said

    def finish(self) -> None:
        """Wait for all that was started."""
        for side in self._sides:
            side.finish()

    def _launch(self, side: Side, is_new: bool) -> None:
        """All that the device does for a cycle; the host goes on at once."""
        self._table_memory.copy_(side.tables, non_blocking=True)
        if is_new:
            self._slot_memory.copy_(side.slots, non_blocking=True)
        self.replay()
        side.result.copy_(self._result, non_blocking=True)

    def _run(self) -> None:
        slots, tables = self._slots, self._tables
        base = self._base.cache
        # Without a guide, what the rows of one are does not count.
        guide, drafter = ("base", base) if self._guide is None else ("guide", self._guide.cache)
        # The last tokens of each text with the guide's behind them: what the passes read.
        tokens = self._guide_said[TOKEN]
        rows = cycle_rows(
            slots["state"], slots["prompts"], tables["drafts"], slots["first"],
            slots["temperature"], slots["seed"], tables[guide], tables["base"], tokens[:TAIL],
            self.shape.drafts, base.block_size, drafter.spare_slot, base.spare_slot,
        )  # fmt: skip
        if self._guide is not None:
            self._draft(self._guide, rows, tokens)
        self._verify(rows, tokens)
        top, lse = (one.view(torch.float32).view(self.shape.slots, -1) for one in self._base_said[MAX:])
        picked = self._base_said[TOKEN].view(self.shape.slots, -1)
        path = tokens[TAIL:] if self.shape.drafts else tokens[1:]
        verified = draft_verify(
            top, lse, picked, rows.drafted, path.T, rows.drafted,
            slots["threshold"], slots["or_equal"], self._by_word, slots["ignore_eos"],
            rows.room, self._marks,
        )  # fmt: skip
        said = self._guide_said[:, TAIL:], self._base_said
        wrote = verified.tokens, verified.written, verified.finish
        cycle_advance(slots["state"], rows.drafted, *wrote, *said)

    def _draft(self, guide: Model, rows: CycleRows, tokens: Tensor) -> None:
        """The guide's passes: the first one reads what it has not read of the text, each further one what
        the one before it picked.
        """
        slots, count = self._slots, self.shape.slots
        sizes = [TAIL * count] + [count] * (self.shape.drafts - 1)
        positions = rows.guide_positions.split_with_sizes(sizes)
        kv_slots = rows.guide_slots.split_with_sizes(sizes)
        for step in range(self.shape.drafts):
            kind = min(step, 1)
            batch = Batch(
                tokens[step + 1] if step else tokens[:TAIL].T, positions[step], kv_slots[step],
                self._begins[kind], rows.guide_lens[step], self._tables["guide"], self._answers[kind],
            )  # fmt: skip
            picks = Picks(slots["temperature"], slots["seed"], rows.guide_noise[step])
            answer(*guide, batch, picks, self._vocab, self._guide_said[:, TAIL + step])

    def _verify(self, rows: CycleRows, tokens: Tensor) -> None:
        """The base's pass over the last token of each text and its drafts."""
        batch = Batch(
            tokens[1:].T, rows.base_positions, rows.base_slots, self._begins[2], rows.base_lens,
            self._tables["base"], self._answers[2],
        )  # fmt: skip
        picks = Picks(rows.base_temperature, rows.base_seed, rows.base_noise)
        answer(*self._base, batch, picks, self._vocab, self._base_said)

    def _fill_tables(self, tables: Views, blocks: Sequence[SlotBlocks]) -> None:
        """Write the slots' drafts and blocks; behind those, where rows that do not count may look, stands the
        block that is nobody's.
        """
        tables["drafts"].numpy()[: len(blocks)] = [slot.drafts for slot in blocks]
        for name, model in (("guide", self._guide), ("base", self._base)):
            if model is None:
                continue
            table = tables[name].numpy()
            table.fill(model.cache.spare_slot // model.cache.block_size)
            for line, slot in zip(table, blocks, strict=False):
                own = getattr(slot, name)[: len(line)]
                line[: len(own)] = own

    def _fill_slots(self, fields: Views, slots: Sequence[SlotStart]) -> None:
        """Write the texts to start with; the slots behind them take no part."""
        for field in fields.values():
            field.zero_()
        columns = dict(zip(SlotStart._fields, zip(*slots, strict=True), strict=True))
        count = len(slots)
        fields["state"][:, :count] = torch.tensor(list(columns.values())[:STATES])
        fields["prompts"][:, :count] = torch.tensor([columns["guide_prompt"], columns["base_prompt"]])
        columns["seed"] = tuple((seed + 2**63) % 2**64 - 2**63 for seed in columns["seed"])
        for name in ("first", "seed", "threshold", "temperature", "or_equal", "ignore_eos"):
            fields[name][:count] = torch.tensor(columns[name])


def cycle_memory(slots: int, device: torch.device) -> Tensor:
    """What all cycles of so many slots keep of their texts and leave: [bytes] uint8, on the device."""
    num_bytes = _state_at(slots) + _num_bytes(_result_layout(slots, MAX_DRAFT))
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _state_at(slots: int) -> int:
    """Where the states of the texts begin in that memory."""
    return _num_bytes(_slots_layout(slots)) - torch.int32.itemsize * STATES * slots


def _slots_layout(slots: int) -> Layout:
    """What the device has to know of the texts; their states come last."""
    return {
        "first": (torch.int64, (slots,)),
        "seed": (torch.int64, (slots,)),
        "threshold": (torch.float64, (slots,)),
        "temperature": (torch.float32, (slots,)),
        "prompts": (torch.int32, (2, slots)),
        "or_equal": (torch.bool, (slots,)),
        "ignore_eos": (torch.bool, (slots,)),
        "state": (torch.int32, (STATES, slots)),
    }


def _tables_layout(shape: CycleShape) -> Layout:
    return {
        "guide": (torch.int32, (shape.slots, shape.guide_width)),
        "base": (torch.int32, (shape.slots, shape.base_width)),
        "drafts": (torch.int32, (shape.slots,)),
    }


def _result_layout(slots: int, drafts: int) -> Layout:
    """What a cycle leaves: the states of the texts, and what `lm_head` said of the guide's rows, pass by pass
    behind the last two tokens of each text, and of the base's.
    """
    return {
        "state": (torch.int32, (STATES, slots)),
        "guide": (torch.int32, (LINES, TAIL + drafts, slots)),
        "base": (torch.int32, (LINES, slots * (drafts + 1))),
    }


def _fields(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """Each field with its first byte, aligned, and the one behind its last."""
    end = 0
    for name, (dtype, shape) in layout.items():
        begin = -(-end // dtype.itemsize) * dtype.itemsize
        end = begin + dtype.itemsize * prod(shape)
        yield name, begin, end


def _num_bytes(layout: Layout) -> int:
    return max(end for _, _, end in _fields(layout))


def _views(memory: Tensor, layout: Layout) -> Views:
    """The fields of `memory`, [bytes] uint8."""
    return {
        name: memory[begin:end].view(layout[name][0]).view(layout[name][1])
        for name, begin, end in _fields(layout)
    }
