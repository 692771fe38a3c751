"""Which batches may come next: those of the kinds that have come, of more texts or fewer, and of longer ones.

Recordings nobody has asked for are made while the engine has nothing to do, one at a time, those of the
fewest texts first: a request that comes meanwhile waits for one of them at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from nudging.core.work import Work
from nudging.executor.batch import BatchShape
from nudging.executor.cuda_graphs import SIZES, WIDTHS, at_least

# So many recordings of each kind are made ahead: all have to be kept.
MAX_AHEAD = 256


class Family(NamedTuple):
    """Batches that differ in the number of their texts: of each text so many rows are computed and so many
    answered; `width`: entries of a block table; `steps`: passes of a path, 0 where it is a pass by itself.
    """

    rows: int
    answers: int
    width: int
    vocab: int
    steps: int

    def shape(self, texts: int) -> BatchShape | None:
        """What a batch of so many texts is padded to, see `cuda_graphs.padded`; None where it is too
        large.
        """
        if texts * self.rows > SIZES[-1]:
            return None
        rows, answers = (at_least(SIZES, max(texts * each, 1)) for each in (self.rows, self.answers))
        return BatchShape(rows, at_least(SIZES, texts) + 1, self.width, answers)


def family_of(works: Collection[Work], shape: BatchShape, vocab: int) -> Family | None:
    """The family of a pass over works in a batch of that shape; None where the works are unlike."""
    kinds = {(work.end - work.start, work.answers) for work in works}
    return None if len(kinds) > 1 else Family(*kinds.pop(), shape.width, vocab, 0)


def widths(width: int, max_blocks: int) -> tuple[int, ...]:
    """A width of block tables and, where texts of at most `max_blocks` blocks outgrow it, the next one."""
    return (width, 2 * width) if width < min(max_blocks, WIDTHS[-1]) else (width,)


def shapes_ahead(
    families: Iterable[Family], texts: int, max_blocks: int
) -> Iterator[tuple[Family, BatchShape]]:
    """What batches of so many texts of these families and of longer texts are padded to, the smallest
    first.
    """
    wider = {family._replace(width=w) for family in families for w in widths(family.width, max_blocks)}
    for family in sorted(wider):
        shape = family.shape(texts)
        if shape is not None:
            yield family, shape
