"""One model's view of a request: its tokens, how many are computed, and the rows it has answered."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from itertools import chain

from nudging.core.block_pool import BlockPool, BlockTable
from nudging.core.prefix_cache import Prefix
from nudging.core.rows import Row
from nudging.errors import NumericalError


class Sequence:
    """Tokens with their cache.  Invariant I1: 0 <= num_computed <= len(tokens); all undo is `truncate`.

    `rows[i]` is what the model says after `tokens[:i]`.  It depends on nothing else, so it stays true
    however the sequence came about: drafting ahead only fills this memo, and `truncate` is the only way
    an entry becomes stale.
    """

    def __init__(self, pool: BlockPool, prompt: Ids[int], salt: str | None = None) -> None:
        """`salt`: only sequences of the same one find each other's blocks."""
        self.prompt_len = len(prompt)
        self.tokens: list[int] = list(prompt)
        self.num_computed = 0
        # Up to here the tokens are prompt and committed output, known to agree; drafts come after.
        self.context_len = len(prompt)
        # The blocks of so many tokens are kept whatever is truncated: a device may still be writing there.
        self.reserved = 0
        # Up to here the cache was computed once and given up since.
        self.lost = 0
        # By position; a row that is not finite is the error that it is for the policy that asks for it.
        self.rows: dict[int, Row | NumericalError] = {}
        self.block_table = BlockTable(pool)
        self._empty = pool.prefixes.empty(salt)
        # The findable beginnings of what is computed, one for each of the first blocks.
        self._prefixes: list[Prefix] = []

    def check(self) -> None:
        """Assert I1 and that the blocks cover what is computed."""
        self.check_as(self.tokens, self.num_computed, self.block_table.ids)

    def check_as(self, tokens: list[int], num_computed: int, blocks: list[int]) -> None:
        """Assert the same where these are not here but carried."""
        assert 0 <= num_computed <= len(tokens), f"{num_computed} of {len(tokens)} computed"
        size = self.block_table.pool.block_size
        held = len(blocks) * size
        assert held >= num_computed, f"blocks hold {held} tokens, {num_computed} are computed"
        found, known = [prefix.block for prefix in self._prefixes], len(self._prefixes)
        assert found == blocks[:known], f"blocks {blocks[:known]} are found as {found}"
        parts = [prefix.tokens for prefix in self._prefixes]
        assert list(chain.from_iterable(parts)) == tokens[: known * size], "a block is found as another"
        assert known * size <= num_computed, "a block is found before it is computed"

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on, the keys and values behind it, and the rows that saw it."""
        if length >= len(self.tokens):
            return
        del self.tokens[length:]
        for position in [p for p in self.rows if p > length]:
            del self.rows[position]
        self.uncompute(length)
        self.lost = min(self.lost, length)
        self.block_table.shrink(max(self.num_computed, self.reserved))

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

    def want_row(self, position: int) -> Row | NumericalError | None:
        """The row after `tokens[:position]`, or None: then the token before it will be computed (again)."""
        row = self.rows.get(position)
        if row is None:
            # A row that was dropped comes back by recomputing one token, which writes the same bytes again.
            self.uncompute(position - 1)
        return row

    @property
    def finite_rows(self) -> dict[int, Row]:
        """The rows that are no errors, by position."""
        return {at: row for at, row in self.rows.items() if isinstance(row, Row)}

    def uncompute(self, length: int) -> None:
        """What follows the first `length` tokens has to be computed again."""
        self.num_computed = min(self.num_computed, length)
        del self._prefixes[self.num_computed // self.block_table.pool.block_size :]

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """Own, alone, the blocks of tokens[start:end]: the (source, destination) block copies to make first.

        Raises OutOfBlocks; what was allocated before it stays owned.
        """
        self.block_table.grow(end)
        return self.block_table.make_writable(start, end)

    def count_known(self, limit: int, carried: list[int] | None = None) -> int:
        """How many blocks that others own hold the first tokens, at most `limit` of them.

        `carried`: the tokens, where they are not here but carried.
        """
        pool, parent = self.block_table.pool, self._empty
        known_tokens = self.tokens if carried is None else carried
        whole = limit // pool.block_size if pool.prefix_caching else 0
        for known in range(whole):
            tokens = known_tokens[known * pool.block_size : (known + 1) * pool.block_size]
            found = pool.prefixes.find(parent, tokens)
            if found is None or not pool.is_owned(found.block):
                return known
            parent = found
        return whole

    def take_cached(self, limit: int) -> int:
        """Go on with findable blocks of the tokens that follow on what is computed, up to token `limit`.

        Returns how many tokens need not be computed any more.
        """
        pool, table, start = self.block_table.pool, self.block_table, self.num_computed
        whole = start == len(self._prefixes) * pool.block_size and len(table.ids) == len(self._prefixes)
        if not whole or not pool.prefix_caching:
            return 0
        while self.num_computed + pool.block_size <= limit:
            tokens = self.tokens[self.num_computed : self.num_computed + pool.block_size]
            found = pool.prefixes.find(self._last_prefix(), tokens)
            if found is None:
                break
            pool.share(found.block)
            table.ids.append(found.block)
            self._prefixes.append(found)
            self.num_computed += pool.block_size
        return self.num_computed - start

    def take_from(self, other: Sequence, limit: int) -> int:
        """Share the blocks of `other`'s first tokens as far as they are ours, at most `limit` tokens.

        Gives back the blocks it had.  Returns how many tokens are computed now.
        """
        self.release()
        end = min(limit, other.num_computed)
        pairs = zip(self.tokens[:end], other.tokens[:end], strict=False)
        self.num_computed = next((i for i, (a, b) in enumerate(pairs) if a != b), end)
        self.block_table = other.block_table.fork(self.num_computed)
        self._prefixes = other._prefixes[: self.num_computed // self.block_table.pool.block_size]
        return self.num_computed

    def register(self) -> None:
        """Make the full blocks of what is computed of prompt and text findable."""
        pool, table = self.block_table.pool, self.block_table
        if not pool.prefix_caching:
            return
        full = min(self.num_computed, self.context_len) // pool.block_size
        for index in range(len(self._prefixes), full):
            tokens = self.tokens[index * pool.block_size : (index + 1) * pool.block_size]
            table.ids[index] = self.register_block(tokens, table.ids[index])

    def register_block(self, tokens: list[int], block: int) -> int:
        """Make the next full block, which holds `tokens`, findable; returns the block that holds them now."""
        pool = self.block_table.pool
        prefix = pool.register(self._last_prefix(), tokens, block)
        if prefix.block != block:
            # Two computed the same side by side: one copy is enough.
            pool.share(prefix.block)
            pool.release(block)
        self._prefixes.append(prefix)
        return prefix.block

    @property
    def num_registered(self) -> int:
        """How many of the first blocks are findable."""
        return len(self._prefixes)

    @property
    def num_owned_from(self) -> int | None:
        """The block from which on all are this sequence's alone and findable by nobody, as far as text can be
        written again; None where it has to own them first.
        """
        pool, ids = self.block_table.pool, self.block_table.ids
        first = min(self.num_computed, self.context_len) // pool.block_size
        alone = len(ids)
        while alone > first and not pool.is_shared(ids[alone - 1]) and ids[alone - 1] not in pool.prefixes:
            alone -= 1
        return alone if alone <= self.num_computed // pool.block_size else None

    def _last_prefix(self) -> Prefix:
        return self._prefixes[-1] if self._prefixes else self._empty

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
        other.block_table = self.block_table.fork(self.num_computed)
        other._empty = self._empty
        other._prefixes = list(self._prefixes)
        return other

    def release(self) -> None:
        """Give every block back; the tokens and rows stay, and the cache can be computed again."""
        self.lost = max(self.lost, self.num_computed)
        self.uncompute(0)
        self.reserved = 0
        self.block_table.shrink(0)
