"""A model's runner that replays recorded passes; see `nudging.graphs`."""

from __future__ import annotations

import torch

from nudging.batch import BatchBuffer, BatchShape
from nudging.decide import Wanted, decide, likeliest
from nudging.errors import NumericalError, OutOfBlocks
from nudging.graphs import Answers, RecordedPass, RecordedPath, Recorder, padded
from nudging.kernels.softmax_stats import softmax_stats
from nudging.models.decoder import Decoder
from nudging.runner import ModelRunner
from nudging.scheduler import Work
from nudging.sequence import Row, Sequence

# The rows of a path, by the sequence they were computed for and their position.
Foreseen = dict[tuple[Sequence, int], Row | NumericalError]


class GraphRunner(ModelRunner):
    """Runs what a ModelRunner runs, from recordings where there are some.

    Where works have a path ahead, the whole of it is computed at once; the passes that then ask for its rows
    find them computed.
    """

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int, recorder: Recorder) -> None:
        super().__init__(decoder, num_blocks, block_size)
        self._recorder = recorder
        self._passes: dict[BatchShape, RecordedPass] = {}
        self._paths: dict[tuple[BatchShape, int], RecordedPath] = {}
        self._seen: set[object] = set()
        self._foreseen: Foreseen = {}

    @torch.inference_mode()
    def execute(self, works: list[Work], wanted: list[Wanted]) -> list[Row | NumericalError]:
        known = self._known(works)
        if known is not None:
            self.passes_made = 0
            return known
        self._foreseen.clear()
        self.passes_made = 1
        shape = padded(works, self.pool.block_size)
        if shape is None:
            return super().execute(works, wanted)
        self.cache.copy_blocks([pair for work in works for pair in work.copies])
        steps = self._path_length(works, wanted)
        answers = self._answers(shape, works)
        path = self._start_path(shape, works, answers, steps) if steps else None
        rows = decide(answers.logits, wanted, answers.stats)
        if path is not None:
            self._foreseen = read_path(path, works)
            self.passes_made += steps
        return rows

    def _known(self, works: list[Work]) -> list[Row | NumericalError] | None:
        """The works' rows where the path that they go on along was computed before."""
        rows = []
        for work in works:
            row = (
                self._foreseen.get((work.request.sequences[work.role], work.end)) if work.is_onward else None
            )
            if row is None:
                return None
            rows.append(row)
        return rows

    def _answers(self, shape: BatchShape, works: list[Work]) -> Answers:
        """One pass over the works in a batch of that shape."""
        recorded = self._passes.get(shape)
        if recorded is not None:
            recorded.buffer.fill(works, self.pool.block_size)
            recorded.replay()
            return recorded.answers
        buffer = self._buffer(shape)
        buffer.fill(works, self.pool.block_size)
        if shape in self._seen:
            made = RecordedPass(buffer, self.decoder.forward, self.cache, self._recorder)
            self._passes[shape] = made
            made.replay()
            return made.answers
        self._seen.add(shape)
        logits = self.decoder.forward(buffer.batch, self.cache)
        return Answers(logits, softmax_stats(logits))

    def _start_path(
        self, shape: BatchShape, works: list[Work], answers: Answers, steps: int
    ) -> RecordedPath | None:
        """Compute the works' paths behind the pass that gave `answers`; None where they are new: the first
        time, single passes do it.
        """
        lanes = shape.seqs - 1
        key = (BatchShape(lanes, shape.seqs, shape.width, lanes), steps)
        path = self._paths.get(key)
        if path is None and key not in self._seen:
            self._seen.add(key)
            return None
        buffers = [self._buffer(key[0]) for _ in range(steps)] if path is None else path.buffers
        for step, buffer in enumerate(buffers):
            ends = [work.end + step for work in works]
            rows = [Work(w.request, w.role, e, e + 1, e + 1) for w, e in zip(works, ends, strict=True)]
            buffer.fill(rows, self.pool.block_size, are_ids_known=False)
        last = torch.tensor(last_answers(works), device=self.decoder.device)
        first = torch.zeros(lanes, dtype=torch.int64, device=self.decoder.device)
        first = first if path is None else path.first
        first[: len(works)] = answers.stats.argmax[last]
        if path is None:
            path = RecordedPath(buffers, first, self.decoder.forward, self.cache, self._recorder)
            self._paths[key] = path
        path.replay()
        return path

    def _path_length(self, works: list[Work], wanted: list[Wanted]) -> int:
        """How many tokens of their paths all works get, and the blocks for them.

        0 leaves the paths to single passes: nobody has one, a token is not the likeliest one, logits are
        wanted, or blocks or context do not suffice for all.
        """
        config = self.decoder.config
        if not all(want.is_plain and want.vocab_size == config.vocab_size for want in wanted):
            return 0
        if any(want.keep_logits for want in wanted) or any(work.first_row > work.end for work in works):
            return 0
        room = min(config.max_len - work.end for work in works)
        steps = min(max(work.ahead for work in works), room)
        if steps <= 0:
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


def last_answers(works: list[Work]) -> list[int]:
    """Where each work's last row stands among the rows that are answered."""
    lasts, at = [], 0
    for work in works:
        at += work.end - work.first_row + 1
        lasts.append(at - 1)
    return lasts


def read_path(path: RecordedPath, works: list[Work]) -> Foreseen:
    """The rows of a path, waited for: those of each work as far as its own path goes."""
    tokens, peaks = path.tokens.tolist(), path.peaks.tolist()
    foreseen: Foreseen = {}
    for index, work in enumerate(works):
        sequence = work.request.sequences[work.role]
        for step in range(min(work.ahead, len(tokens))):
            peak, lse = peaks[step]
            foreseen[sequence, work.end + step + 1] = likeliest(tokens[step][index], peak[index], lse[index])
    return foreseen
