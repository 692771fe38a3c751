"""Fixed-size blocks of key-value slots: who owns which, counted by references."""

from __future__ import annotations

from nudging.errors import OutOfBlocks


class BlockPool:
    """The blocks of one model's cache.  Invariant I2: free + owned == total."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))
        self._references = [0] * total

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """A block with one reference.  Raises OutOfBlocks when none is free."""
        if not self._free:
            raise OutOfBlocks(
                f"all {self.total} blocks are in use; raise kv_cache_memory or send less at once"
            )
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of an owned block."""
        assert self._references[block] > 0, f"block {block} is free and cannot be shared"
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        assert self._references[block] > 0, f"block {block} was released twice"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def check(self) -> None:
        """Assert I2: every block is either free or owned, and no block is listed twice."""
        owned = sum(count > 0 for count in self._references)
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert self.num_free + owned == self.total, (
            f"{self.num_free} free + {owned} owned != {self.total} blocks"
        )


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
        """Give back the blocks past `num_tokens` tokens."""
        keep = self.pool.blocks_for(num_tokens)
        for block in self.ids[keep:]:
            self.pool.release(block)
        del self.ids[keep:]

    def fork(self) -> BlockTable:
        """A table of the same blocks, shared until one side writes."""
        other = BlockTable(self.pool)
        for block in self.ids:
            self.pool.share(block)
        other.ids = list(self.ids)
        return other

    def missing(self, first: int, last: int) -> int:
        """How many blocks have to be allocated before the tokens of [first, last) can be written."""
        end = self.pool.blocks_for(last)
        shared = sum(map(self.pool.is_shared, self.ids[first // self.pool.block_size : end]))
        return shared + max(end - len(self.ids), 0)

    def make_writable(self, first: int, last: int) -> list[tuple[int, int]]:
        """Own alone every block that holds a token of [first, last): the (source, destination) copies to
        make.
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
        return copies

    def slot(self, position: int) -> int:
        """The cache slot of the token at `position`."""
        size = self.pool.block_size
        return self.ids[position // size] * size + position % size
