"""A model's runner that replays recorded passes; see `nudging.executor.cuda_graphs`."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from nudging.core.fast_path import FastPath
from nudging.core.request import Request
from nudging.core.rows import Row, Rows
from nudging.core.sequence import Sequence
from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.errors import NumericalError, OutOfBlocks
from nudging.executor.batch import BatchBuffer, BatchShape
from nudging.executor.cuda_graphs import (
    WIDTHS,
    PickBuffer,
    RecordedPass,
    RecordedPath,
    Recorder,
    answer,
    is_picked_by_head,
    padded,
    path_shape,
    read,
)
from nudging.executor.cycles.overlap import Overlap
from nudging.executor.model_runner import ModelRunner, by_work
from nudging.executor.sampler import row_of
from nudging.executor.warmup import MAX_AHEAD, Family, family_of, shapes_ahead
from nudging.kernels.flash_attn import FlashAttn
from nudging.kernels.lm_head import LINES, TOKEN
from nudging.models.decoder import Decoder

# The rows of a path, by the sequence they were computed for and their position.
Foreseen = dict[tuple[Sequence, int], Row | NumericalError]
# What a recording was made for: the batch's shape, the vocabulary, and the passes of a path.
Key = tuple[BatchShape, int, int]


class GraphRunner(ModelRunner):
    """Runs what a ModelRunner runs, from recordings where the head alone can answer for all rows.

    Where works have a path ahead, the whole of it is computed at once; the passes that then ask for its rows
    find them computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        recorder: Recorder,
        prefix_caching: bool = True,
        flash: FlashAttn | None = None,
    ) -> None:
        super().__init__(decoder, num_blocks, block_size, prefix_caching, flash=flash)
        self.recorder = recorder
        self._passes: dict[Key, RecordedPass] = {}
        self._paths: dict[Key, RecordedPath] = {}
        self._seen: set[Key] = set()
        self._foreseen: Foreseen = {}
        # Of the batches that came, those whose works were alike; and how many recordings were made ahead.
        self._families: set[Family] = set()
        self._ahead = 0
        # The cycles that this model takes part in, where there are any.
        self.overlaps: list[Overlap] = []

    @property
    def takes_fast_path(self) -> bool:
        return False

    @torch.inference_mode()
    def execute(
        self, works: list[Work], wanted: list[Wanted], fast_path: FastPath | None = None
    ) -> list[Rows | None]:
        assert fast_path is None, "recordings are of requests that Python carries"
        if not all(work.is_onward for work in works):
            self._foreseen.clear()
        # Before a cycle begins in these blocks, and for those whose rows are there already, too.
        self.cache.copy_blocks([pair for work in works for pair in work.copies])
        works = [work._replace(copies=()) if work.copies else work for work in works]
        found: list[Rows | None] = [None] * len(works)
        put_off: set[Request] = set()
        for overlap in self.overlaps:
            rows, late = overlap.rows(self, works, wanted)
            put_off |= late
            self.cycle_time = overlap.take_time() or self.cycle_time
            found = [a if a is not None else b for a, b in zip(found, rows, strict=True)]
        if sum(overlap.is_under_way for overlap in self.overlaps) > 1:
            self._disturb()
        ends = [0, *accumulate(work.answers for work in works)]
        rest = [i for i, rows in enumerate(found) if rows is None and works[i].request not in put_off]
        self.passes_made = 0
        if rest:
            asked = [want for i in rest for want in wanted[ends[i] : ends[i + 1]]]
            missing = [works[i] for i in rest]
            for i, answer in zip(rest, by_work(self._execute(missing, asked), missing), strict=True):
                found[i] = answer
        return found

    def close(self) -> None:
        for overlap in self.overlaps:
            overlap.close()
        self.overlaps.clear()

    @torch.inference_mode()
    def record_ahead(self, texts: int) -> bool:
        if any(overlap.record_ahead(texts) for overlap in self.overlaps):
            return True
        if self._ahead == MAX_AHEAD or not self.recorder.has_room():
            return False
        max_blocks = min(-(-self.decoder.config.max_len // self.pool.block_size), self.pool.total)
        for family, shape in shapes_ahead(self._families, texts, max_blocks):
            key = shape, family.vocab, family.steps
            if key not in self._passes and key not in self._paths:
                self._ahead += 1
                (self._record_path if family.steps else self._record_pass)(key)
                return True
        return False

    def _disturb(self) -> None:
        for overlap in self.overlaps:
            overlap.disturb()

    def _execute(self, works: list[Work], wanted: list[Wanted]) -> list[Row | NumericalError]:
        known = self._known(works)
        if known is not None:
            self.passes_made = 0
            return known
        self._foreseen.clear()
        self._disturb()
        self.passes_made = 1
        shape = self._shape(works, wanted)
        if shape is None:
            return [row for rows in super().execute(works, wanted) for row in rows or ()]
        vocab = wanted[0].vocab_size if wanted else self.decoder.config.vocab_size
        self.cache.copy_blocks([pair for work in works for pair in work.copies])
        steps, num_known = self._path_length(works), self._num_known
        said = self._answers((shape, vocab, 0), works, wanted)
        path = self._start_path((shape, vocab, steps), works, wanted, said) if steps else None
        rows = read_rows(said, len(wanted))
        if path is not None:
            self._foreseen = read_path(path, works)
            self.passes_made += steps
        if self._num_known != num_known:
            # Kernels were compiled, or recorded: that says nothing of the next one.
            self.passes_made = 0
        return rows

    @property
    def _num_known(self) -> int:
        """How many shapes came, and how many of them were recorded."""
        return len(self._seen) + len(self._passes) + len(self._paths)

    def _known(self, works: list[Work]) -> list[Row | NumericalError] | None:
        """The works' rows where the path that they go on along was computed before."""
        if not self._foreseen or not all(work.is_onward for work in works):
            return None
        rows = [self._foreseen.get((work.request.sequences[work.role], work.end)) for work in works]
        return None if None in rows else [row for row in rows if row is not None]

    def _shape(self, works: list[Work], wanted: list[Wanted]) -> BatchShape | None:
        """The shape to record the works in; None where somebody needs logits, or a pass is too large."""
        if not all(map(is_picked_by_head, wanted)) or len({want.vocab_size for want in wanted}) > 1:
            return None
        return padded(works, self.pool.block_size)

    def _answers(self, key: Key, works: list[Work], wanted: list[Wanted]) -> Tensor:
        """One pass over the works in a batch of that shape: what its rows said, see `lm_head`."""
        shape, vocab, _ = key
        family = family_of(works, shape, vocab)
        if family is not None:
            self._families.add(family)
        if key not in self._passes and key not in self._seen:
            self._seen.add(key)
            batch, picks = self._buffer(shape).fill(works, self.pool.block_size), self._picks(shape)
            picks.fill(wanted)
            said = torch.empty((LINES, shape.answers), dtype=torch.int32, device=self.decoder.device)
            answer(self.decoder, self.cache, batch, picks.picks, vocab, said)
            return said
        recorded = self._passes.get(key) or self._record_pass(key)
        recorded.buffer.fill(works, self.pool.block_size)
        recorded.picks.fill(wanted)
        recorded.replay()
        return recorded.said

    def _record_pass(self, key: Key) -> RecordedPass:
        shape, vocab, _ = key
        buffer, picks = self._buffer(shape), self._picks(shape)
        buffer.fill_idle(self.pool.block_size)
        picks.fill([])
        recorded = RecordedPass(self.decoder, self.cache, buffer, picks, vocab, self.recorder)
        self._passes[key] = recorded
        return recorded

    def _start_path(
        self, key: Key, works: list[Work], wanted: list[Wanted], said: Tensor
    ) -> RecordedPath | None:
        """Compute the works' paths behind the pass that `said`; None where they are new: the first time,
        single passes do it.
        """
        shape, vocab, steps = key
        key = path_shape(shape, works, steps, self.pool.block_size), vocab, steps
        self._families.add(Family(1, 1, key[0].width, vocab, steps))
        if key not in self._paths and key not in self._seen:
            self._seen.add(key)
            return None
        path = self._paths.get(key) or self._record_path(key)
        lasts = last_answers(works)
        for step, (buffer, picked) in enumerate(zip(path.buffers, path.picks, strict=True)):
            ends = [work.end + step for work in works]
            rows = [Work(w.request, w.role, e, e + 1, e + 1) for w, e in zip(works, ends, strict=True)]
            buffer.fill(rows, self.pool.block_size, are_ids_known=False)
            picked.fill([wanted[i]._replace(position=wanted[i].position + step + 1) for i in lasts])
        # From pinned memory: else the host would wait here for the pass that came before.
        pinned = self.decoder.device.type == "cuda"
        at = torch.tensor(lasts, pin_memory=pinned).to(self.decoder.device, non_blocking=True)
        path.first[: len(works)] = said[TOKEN, at]
        path.replay()
        return path

    def _record_path(self, key: Key) -> RecordedPath:
        shape, vocab, steps = key
        buffers = [self._buffer(shape) for _ in range(steps)]
        picks = [self._picks(shape) for _ in range(steps)]
        for buffer, picked in zip(buffers, picks, strict=True):
            buffer.fill_idle(self.pool.block_size)
            picked.fill([])
        first = torch.zeros(shape.rows, dtype=torch.int32, device=self.decoder.device)
        path = RecordedPath(self.decoder, self.cache, buffers, picks, first, vocab, self.recorder)
        self._paths[key] = path
        return path

    def _path_length(self, works: list[Work]) -> int:
        """How many tokens of their paths all works get, and the blocks for them; 0 where nobody has one, or
        blocks or context do not suffice for all: then single passes go as far as they can.
        """
        if any(work.first_row > work.end for work in works):
            return 0
        room = min(self.decoder.config.max_len - work.end for work in works)
        steps = min(max(work.ahead for work in works), room)
        if steps <= 0 or max(work.end for work in works) + steps > WIDTHS[-1] * self.pool.block_size:
            return 0
        for work in works:
            sequence = work.request.sequences[work.role]
            if work.ahead:
                # What stood behind is no part of the path; cut off later, it would take the blocks along.
                sequence.truncate(work.end)
            try:
                sequence.block_table.grow(work.end + steps)
            except OutOfBlocks:
                # The work's own blocks are there: whatever was missing is missing behind them.
                return 0
        return steps

    def _buffer(self, shape: BatchShape) -> BatchBuffer:
        return BatchBuffer(shape, self.decoder.device, self.cache.spare_slot)

    def _picks(self, shape: BatchShape) -> PickBuffer:
        return PickBuffer(shape.answers, self.decoder.device)


def last_answers(works: list[Work]) -> list[int]:
    """Where each work's last row stands among the rows that are answered."""
    lasts, at = [], 0
    for work in works:
        at += work.end - work.first_row + 1
        lasts.append(at - 1)
    return lasts


def read_rows(said: Tensor, count: int) -> list[Row | NumericalError]:
    """The first `count` rows of a pass that said this, waited for."""
    columns = zip(*(column[:count] for column in read(said)), strict=True)
    return [row_of(*column) for column in columns]


def read_path(path: RecordedPath, works: list[Work]) -> Foreseen:
    """The rows of a path, waited for: those of each work as far as its own path goes."""
    columns = [read(said) for said in path.said.cpu()]
    foreseen: Foreseen = {}
    for index, work in enumerate(works):
        sequence = work.request.sequences[work.role]
        for step, (token, top, peak, lse) in enumerate(columns[: work.ahead]):
            row = row_of(token[index], top[index], peak[index], lse[index])
            foreseen[sequence, work.end + step + 1] = row
    return foreseen
