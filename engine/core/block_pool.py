"""Fixed-size blocks of key-value slots and their owners, counted by references."""

from __future__ import annotations

from nudging.core.prefix_cache import Prefix, PrefixCache
from nudging.errors import OutOfBlocks


class BlockPool:
    """The blocks of one model's cache.  Invariant I2: free + owned + cached == total.

    A cached block has no holder and is findable by its content (see PrefixCache); where no block is free,
    the longest unused of them is given away.
    """

    def __init__(self, total: int, block_size: int, prefix_caching: bool = True) -> None:
        self.total = total
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.prefixes = PrefixCache()
        self._free = list(range(total - 1, -1, -1))
        # The longest unused first; a dict keeps the order.
        self._cached: dict[int, None] = {}
        self._references = [0] * total
        # How often each was given out.
        self._times = [0] * total

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """How many blocks can be allocated."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """A block with one reference.  Raises OutOfBlocks when all are owned."""
        if self._cached and not self._free:
            self.forget(next(iter(self._cached)))
        if not self._free:
            raise OutOfBlocks(
                f"all {self.total} blocks are in use; raise kv_cache_memory or send less at once"
            )
        block = self._free.pop()
        self._references[block] = 1
        self._times[block] += 1
        return block

    def stamp(self, block: int) -> tuple[int, int]:
        """The block and how often it was given out: its owner of now may have lost and regained it."""
        return block, self._times[block]

    def share(self, block: int) -> None:
        """One more holder of an owned or cached block."""
        assert self._references[block] > 0 or block in self._cached, (
            f"block {block} is free and cannot be shared"
        )
        self._cached.pop(block, None)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; after the last one the block is cached if it is findable, else free."""
        assert self._references[block] > 0, f"block {block} was released twice"
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self.prefixes:
                self._cached[block] = None
            else:
                self._free.append(block)

    def register(self, parent: Prefix, tokens: list[int], block: int) -> Prefix:
        """Make an owned block findable by its tokens; where another one is, return that one's prefix."""
        prefix, stale = self.prefixes.add(parent, tokens, block)
        if stale is not None and stale in self._cached:
            del self._cached[stale]
            self._free.append(stale)
        return prefix

    def forget(self, block: int) -> None:
        """The block is not findable any more; a cached one is free then."""
        if block in self.prefixes:
            self.prefixes.forget(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def is_owned(self, block: int) -> bool:
        return self._references[block] > 0

    def check(self) -> None:
        """Assert I2: every block is free, owned or cached, and nothing twice; cached ones are findable."""
        owned = self.total - self._references.count(0)
        free, cached, findable = set(self._free), self._cached.keys(), self.prefixes.blocks
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert self.num_free + owned + self.num_cached == self.total, (
            f"{self.num_free} free + {owned} owned + {self.num_cached} cached != {self.total} blocks"
        )
        assert cached <= findable, f"nobody can find blocks {sorted(cached - findable)}"
        assert not any(map(self._references.__getitem__, cached)), "a block is cached and owned"
        assert free.isdisjoint(findable), "a block is free and findable"


class BlockTable:
    """The blocks of one sequence, in order: token i lives in block ids[i // block_size]."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.ids: list[int] = []

    def grow(self, num_tokens: int) -> None:
        """Own enough blocks for `num_tokens` tokens.  Raises OutOfBlocks; what was allocated stays owned."""
        for _ in range(self.pool.blocks_for(num_tokens) - len(self.ids)):
            self.ids.append(self.pool.allocate())

    def shrink(self, num_tokens: int) -> None:
        """Give back the blocks past `num_tokens` tokens, the last one first: so it leaves the cache first."""
        keep = self.pool.blocks_for(num_tokens)
        for block in reversed(self.ids[keep:]):
            self.pool.release(block)
        del self.ids[keep:]

    def fork(self, num_tokens: int) -> BlockTable:
        """A table of the same blocks for the first `num_tokens` tokens, shared until one side writes."""
        other = BlockTable(self.pool)
        other.ids = self.ids[: self.pool.blocks_for(num_tokens)]
        for block in other.ids:
            self.pool.share(block)
        return other

    def missing(self, first: int, last: int) -> int:
        """How many blocks have to be allocated before the tokens of [first, last) can be written."""
        end = self.pool.blocks_for(last)
        shared = sum(map(self.pool.is_shared, self.ids[first // self.pool.block_size : end]))
        return shared + max(end - len(self.ids), 0)

    def make_writable(self, first: int, last: int) -> list[tuple[int, int]]:
        """Own alone every block that holds a token of [first, last), and let none be found by what it held:
        the (source, destination) copies to make.
        """
        copies = []
        size = self.pool.block_size
        for index in range(first // size, self.pool.blocks_for(last)):
            block = self.ids[index]
            if self.pool.is_shared(block):
                fresh = self.pool.allocate()
                self.pool.release(block)
                self.ids[index] = fresh
                copies.append((block, fresh))
            else:
                self.pool.forget(block)
        return copies

    def stamps(self, part: slice = slice(None)) -> list[tuple[int, int]]:
        """The blocks, or a part of them, each with how often its pool has given it out."""
        return [self.pool.stamp(block) for block in self.ids[part]]

    def slot(self, position: int) -> int:
        """The cache slot of the token at `position`."""
        size = self.pool.block_size
        return self.ids[position // size] * size + position % size
