"""One model's view of a request: its tokens, how many are computed, and the rows it has answered."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any

from nudging.blocks import BlockPool, BlockTable


@dataclass(frozen=True, slots=True)
class Row:
    """What a model says after a prefix: the token it would write, and how sure it is.

    `token` is the pick under the request's sampling parameters and the noise of its output position;
    `top_token` and `top_prob` are the likeliest token and its probability at temperature 1, before any
    filter.  `logits`, [vocab] fp32, is there when the policy or the request asked for it.
    """

    token: int
    top_token: int
    top_prob: float
    logits: Any = None


class Sequence:
    """Tokens with their cache.  Invariant I1: 0 <= num_computed <= len(tokens); all undo is `truncate`.

    `rows[i]` is what the model says after `tokens[:i]`.  It depends on nothing else, so it stays true
    however the sequence came about: drafting ahead only fills this memo, and `truncate` is the only way
    an entry becomes stale.
    """

    def __init__(self, pool: BlockPool, prompt: Ids[int]) -> None:
        self.prompt_len = len(prompt)
        self.tokens: list[int] = list(prompt)
        self.num_computed = 0
        # Up to here the tokens are prompt and committed output, known to agree; drafts come after.
        self.context_len = len(prompt)
        # Up to here the cache was computed once and given up since.
        self.lost = 0
        self.rows: dict[int, Row] = {}
        self.block_table = BlockTable(pool)

    def check(self) -> None:
        """Assert I1 and that the blocks cover what is computed."""
        assert 0 <= self.num_computed <= len(self.tokens), (
            f"{self.num_computed} of {len(self.tokens)} computed"
        )
        held = len(self.block_table.ids) * self.block_table.pool.block_size
        assert held >= self.num_computed, f"blocks hold {held} tokens, {self.num_computed} are computed"

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on, the keys and values behind it, and the rows that saw it."""
        if length >= len(self.tokens):
            return
        del self.tokens[length:]
        for position in [p for p in self.rows if p > length]:
            del self.rows[position]
        self.num_computed = min(self.num_computed, length)
        self.lost = min(self.lost, length)
        self.block_table.shrink(self.num_computed)

    def set_context(self, start: int, ids: Ids[int]) -> int | None:
        """Make `tokens[start:]` begin with `ids`: what already agrees is kept, what differs is truncated.

        Returns the position of the first token that had to be replaced, None where none had to.
        """
        for offset, token in enumerate(ids):
            position = start + offset
            if position < len(self.tokens) and self.tokens[position] == token:
                continue
            replaced = position < len(self.tokens)
            self.truncate(position)
            self.tokens.extend(ids[offset:])
            return position if replaced else None
        return None

    def want_row(self, position: int) -> Row | None:
        """The row after `tokens[:position]`, or None: then the token before it will be computed (again)."""
        row = self.rows.get(position)
        if row is None:
            # A row that was dropped comes back by recomputing one token, which writes the same bytes again.
            self.num_computed = min(self.num_computed, position - 1)
        return row

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """Own, alone, the blocks of tokens[start:end]: the (source, destination) block copies to make first.

        Raises OutOfBlocks; what was allocated before it stays owned.
        """
        self.block_table.grow(end)
        return self.block_table.make_writable(start, end)

    def computed(self, end: int) -> int:
        """The cache now reaches to `end`; returns how many of the tokens it gained had been lost before."""
        again = max(min(end, self.lost) - self.num_computed, 0)
        self.num_computed = end
        if end >= self.lost:
            self.lost = 0
        return again

    def forget_rows_before(self, position: int) -> None:
        """Drop rows that no policy will ask for any more."""
        for old in [p for p in self.rows if p < position]:
            del self.rows[old]

    def fork(self) -> Sequence:
        """A copy that shares every block until one side writes."""
        other = Sequence(self.block_table.pool, ())
        other.prompt_len = self.prompt_len
        other.tokens = list(self.tokens)
        other.num_computed = self.num_computed
        other.context_len = self.context_len
        other.rows = dict(self.rows)
        other.block_table = self.block_table.fork()
        return other

    def release(self) -> None:
        """Give every block back; the tokens and rows stay, and the cache can be computed again."""
        self.lost = max(self.lost, self.num_computed)
        self.num_computed = 0
        self.block_table.shrink(0)
