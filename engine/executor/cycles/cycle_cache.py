"""Which cycles are recorded, and which may be worth recording.

Recording takes as long as many cycles do, so nothing waits for one that is not sure to be used: a shape is
recorded when it comes again, when many cycles have missed it, or while there is nothing else to do.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

from torch import Tensor

from nudging.executor.cuda_graphs import SIZES, Recorder, at_least
from nudging.executor.cycles.recorded_cycle import CycleShape, Model, RecordedCycle, cycle_memory
from nudging.executor.warmup import MAX_AHEAD, widths

# So many cycles with other drafts than are wanted, and theirs are recorded at once.
PATIENCE = 32


class CycleCache:
    """The recorded cycles of a guide and its base, or of one model alone."""

    def __init__(
        self, guide: Model | None, base: Model, vocab: int, marks: Tensor, recorder: Recorder
    ) -> None:
        """See RecordedCycle."""
        self.shapes: dict[CycleShape, RecordedCycle] = {}
        self._guide, self._base, self._vocab, self._marks = guide, base, vocab, marks
        self._recorder = recorder
        # By slots; see `cycle_memory`.
        self._memories: dict[int, Tensor] = {}
        self._seen: set[CycleShape] = set()
        # How often a text would have gone on with a shape that is not recorded.
        self._missed: Counter[CycleShape] = Counter()
        # What came: drafts and widths; and how many recordings were made ahead.
        self._families: set[tuple[int, int, int]] = set()
        self._ahead = 0

    def find(self, shape: CycleShape) -> RecordedCycle | None:
        """A recording for texts to begin with, while none of another cycle is needed any more.  Where the
        shape is new, one for a few more slots does, and where there is none, None.
        """
        self._families.add(shape[1:])
        if shape not in self.shapes and shape not in self._seen:
            self._seen.add(shape)
            fitting = [
                known
                for known in self.shapes
                if shape.slots <= known.slots <= 2 * shape.slots and shape[1:] == known[1:]
            ]
            return self.shapes[min(fitting)] if fitting else None
        return self.shapes.get(shape) or self._record(shape)

    def find_onward(self, shape: CycleShape, known: CycleShape) -> RecordedCycle | None:
        """A recording of as many slots as `known` has, which texts that are on their way can go on with."""
        if shape.drafts == known.drafts and all(a <= b for a, b in zip(shape, known, strict=True)):
            return self.shapes[known]
        shape = shape._replace(slots=known.slots)
        if shape not in self.shapes:
            self._families.add(shape[1:])
            self._missed[shape] += 1
        return self.shapes.get(shape)

    def is_due(self, shape: CycleShape, known: CycleShape) -> bool:
        """Whether texts that go on without this shape should rather begin anew, and have it recorded."""
        shape = shape._replace(slots=known.slots)
        if self._missed[shape] >= PATIENCE:
            self._seen.add(shape)
        return shape not in self.shapes and shape in self._seen

    def record_ahead(self, texts: int, max_blocks: tuple[int, int]) -> bool:
        """Record one more cycle of so many texts that may come, of the guide and the base at most so many
        blocks; False where none is left.
        """
        if self._ahead == MAX_AHEAD or not self._recorder.has_room():
            return False
        slots = at_least(SIZES, texts)
        for drafts, *seen in sorted(self._families):
            for both in product(*map(widths, seen, max_blocks)):
                shape = CycleShape(slots, drafts, *both)
                if shape not in self.shapes and texts * (drafts + 1) <= SIZES[-1]:
                    self._ahead += 1
                    self._record(shape)
                    return True
        return False

    def close(self) -> None:
        """Wait for the cycles that are under way, and forget all of them."""
        for recorded in self.shapes.values():
            recorded.finish()
        self.shapes.clear()
        self._memories.clear()

    def _record(self, shape: CycleShape) -> RecordedCycle:
        if shape.slots not in self._memories:
            self._memories[shape.slots] = cycle_memory(shape.slots, self._marks.device)
        memory = self._memories[shape.slots]
        recorded = self.shapes[shape] = RecordedCycle(
            self._guide, self._base, shape, self._vocab, self._marks, memory, self._recorder
        )
        return recorded
