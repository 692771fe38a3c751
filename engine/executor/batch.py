"""The ragged batch of one model's step, and the block-paged cache it reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nudging import _C
from nudging.core.work import Work
from nudging.models.batch import Batch

# Unused entries of a block table hold an id that no pool has: reading one fails instead of going unnoticed.
IMPOSSIBLE_BLOCK = 2_147_480_000
# Block tables are this much wider than they have to be at most, so that texts that grow keep their shape.
WIDTH_STEP = 8
# Shapes whose memory is kept: decoding comes back to few, and prompts have no two alike.
KEPT_SHAPES = 64


class BatchShape(NamedTuple):
    """The sizes of a batch: rows, sequences, entries of a block table, rows whose logits are wanted."""

    rows: int
    seqs: int
    width: int
    answers: int


def shape_of(works: Sequence[Work], block_size: int) -> BatchShape:
    """The shape of the works' batch; its block tables hold the longest text with the path behind it."""
    width = max(-(-(work.end + work.ahead) // block_size) for work in works)
    return BatchShape(
        sum(work.end - work.start for work in works),
        len(works),
        -(-width // WIDTH_STEP) * WIDTH_STEP,
        sum(work.answers for work in works),
    )


class BatchBuffer:
    """The memory of batches of one shape, on the host and on the device: filled anew for every step.

    One block of memory holds all fields, so that one copy takes them to the device; on the CPU it is the
    device's memory itself.  On a GPU the host's side is pinned and the copy does not wait: before a buffer is
    filled again, its caller must have waited for what was computed from it.
    """

    def __init__(self, shape: BatchShape, device: torch.device, spare_slot: int) -> None:
        """`spare_slot`: the first one of a block that is no pool's.  A shape with more rows than the works
        has one sequence more, too, which owns them; they are written there.
        """
        self.shape = shape
        self._spare_slot = spare_slot
        rows, seqs, width, answers = shape
        # int64 fields first, then int32: both stay aligned.
        long, short = 3 * rows + answers, 2 * seqs + 1 + seqs * width
        host = torch.empty(8 * long + 4 * short, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._host = host
        self._device = host if device.type == "cpu" else torch.empty_like(host, device=device)
        self.batch = Batch(*_fields(self._device, shape))
        self._ids, self._positions, self._slots, self._starts, self._lengths, self._tables, self._answers = (
            field.numpy() for field in _fields(host, shape)
        )

    def fill(self, works: Sequence[Work], block_size: int, are_ids_known: bool = True) -> Batch:
        """The works' batch.  Their blocks must be owned alone and cover their ends.

        Ids that are not known yet are left to be written on the device.
        """
        # Lists first: one assignment of many numbers is cheaper than many of one.
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        lengths: list[int] = []
        answers: list[int] = []
        self._tables.fill(IMPOSSIBLE_BLOCK)
        for table, work in zip(self._tables, works, strict=False):
            sequence = work.request.sequences[work.role]
            start, end, blocks = work.start, work.end, sequence.block_table.ids
            # The row after tokens[:p] is computed where token p - 1 is fed.
            answers += range(len(positions) + work.first_row - 1 - start, len(positions) + end - start)
            if are_ids_known:
                ids += sequence.tokens[start:end]
            positions += range(start, end)
            slots += [blocks[p // block_size] * block_size + p % block_size for p in range(start, end)]
            starts.append(len(positions))
            lengths.append(end)
            table[: len(blocks)] = blocks[: self.shape.width]
        rows = len(positions)
        self._ids[: len(ids)] = ids
        self._positions[:rows], self._slots[:rows] = positions, slots
        self._starts[: len(starts)], self._lengths[: len(lengths)] = starts, lengths
        self._answers[: len(answers)] = answers
        self._ids[len(ids) :] = self._positions[rows:] = self._answers[len(answers) :] = 0
        self._slots[rows:] = self._spare_slot
        self._starts[len(starts) :], self._lengths[len(lengths) :] = rows, 0
        if rows < self.shape.rows:
            # Rows that pad the batch are a sequence of their own, in the block that is no pool's.
            self._starts[-1], self._lengths[-1] = self.shape.rows, self.shape.rows - rows
            self._tables[-1] = self._spare_slot // block_size
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return self.batch

    def fill_idle(self, block_size: int) -> Batch:
        """A batch that changes nothing: the rows of all sequences, about equally many of each, are written to
        the block that is no pool's.
        """
        rows, seqs, _, _ = self.shape
        starts = np.arange(seqs + 1) * rows // seqs
        self._starts[:], self._lengths[:] = starts, np.diff(starts)
        self._positions[:] = np.arange(rows) - np.repeat(starts[:-1], np.diff(starts))
        self._ids[:] = self._answers[:] = 0
        self._slots[:] = self._spare_slot
        self._tables[:] = self._spare_slot // block_size
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return self.batch

    def fill_carried(self, carried: _C.FastPath, block_size: int) -> Batch:
        """The batch of what `carried` computes now and of what was added to it; the twin is `fill`."""
        carried.fill(self._host.data_ptr(), *self.shape, block_size, self._spare_slot)
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return self.batch


class BatchBuilder:
    """Makes the batches of one model; what it returns holds until it makes the next one of that shape."""

    def __init__(self, block_size: int, device: torch.device, spare_slot: int) -> None:
        self._block_size = block_size
        self._device = device
        self._spare_slot = spare_slot
        self._buffers: dict[BatchShape, BatchBuffer] = {}

    def build(self, works: Sequence[Work], carried: _C.FastPath | None = None) -> Batch:
        """The ragged tensors of what is `carried`, then of the works; their blocks must be owned alone and
        cover their ends.
        """
        if carried is None:
            return self._buffer(shape_of(works, self._block_size)).fill(works, self._block_size)
        for work in works:
            sequence = work.request.sequences[work.role]
            ids, blocks = sequence.tokens[work.start : work.end], sequence.block_table.ids
            carried.add_foreign(ids, work.start, work.end, work.first_row, work.ahead, blocks)
        buffer = self._buffer(BatchShape(*carried.sizes(self._block_size)))
        return buffer.fill_carried(carried, self._block_size)

    def _buffer(self, shape: BatchShape) -> BatchBuffer:
        buffer = self._buffers.pop(shape, None) or BatchBuffer(shape, self._device, self._spare_slot)
        # The dictionary is in order of use: the first entry is the one that was not used for longest.
        self._buffers[shape] = buffer
        if len(self._buffers) > KEPT_SHAPES:
            del self._buffers[next(iter(self._buffers))]
        return buffer


def _fields(
    memory: Tensor, shape: BatchShape
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of a batch, in its order, as views of its memory."""
    rows, seqs, width, answers = shape
    long = 8 * (3 * rows + answers)
    ids, positions, slots, logit_rows = (
        memory[:long].view(torch.int64).split_with_sizes([rows, rows, rows, answers])
    )
    starts, lengths, tables = memory[long:].view(torch.int32).split_with_sizes([seqs + 1, seqs, seqs * width])
    return ids, positions, slots, starts, lengths, tables.view(seqs, width), logit_rows
