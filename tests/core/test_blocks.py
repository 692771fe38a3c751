"""Blocks and sequences keep their invariants whatever is done to them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nudging.core.block_pool import BlockPool, BlockTable
from nudging.core.rows import Row
from nudging.core.sequence import Sequence
from nudging.errors import OutOfBlocks


def test_an_exhausted_pool_says_so_and_stays_whole() -> None:
    pool = BlockPool(2, 4)
    table = BlockTable(pool)
    with pytest.raises(OutOfBlocks, match="all 2 blocks are in use"):
        table.grow(9)
    pool.check()
    table.shrink(0)
    assert pool.num_free == 2


def test_a_block_released_twice_is_caught() -> None:
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(block)


def test_a_fork_shares_blocks_until_it_writes() -> None:
    pool = BlockPool(4, 4)
    table = BlockTable(pool)
    table.grow(6)
    fork = table.fork(6)
    assert pool.num_free == 2
    assert (fork.missing(5, 6), fork.missing(3, 9)) == (1, 3)
    copies = fork.make_writable(5, 6)
    assert (fork.missing(5, 6), fork.slot(5)) == (0, 4 * fork.ids[1] + 1)
    assert copies == [(table.ids[1], fork.ids[1])]
    assert fork.ids[0] == table.ids[0]
    assert table.make_writable(5, 6) == [], "the last holder owns the block alone"


def test_truncate_forgets_tokens_cache_and_rows_behind() -> None:
    pool = BlockPool(4, 2)
    sequence = Sequence(pool, [1, 2, 3])
    sequence.tokens += [4, 5]
    sequence.block_table.grow(5)
    sequence.num_computed = 5
    sequence.rows = {3: Row(4, 4, 0.9), 4: Row(5, 5, 0.9), 5: Row(6, 6, 0.9)}
    sequence.truncate(4)
    assert sequence.tokens == [1, 2, 3, 4]
    assert sequence.num_computed == 4
    assert sorted(sequence.rows) == [3, 4], "the row after tokens[:4] still holds"
    assert pool.num_free == 2


def test_a_context_that_agrees_keeps_what_was_computed() -> None:
    sequence = Sequence(BlockPool(4, 2), [1, 2])
    assert sequence.set_context(2, [3, 4, 5]) is None, "nothing was replaced"
    sequence.block_table.grow(5)
    sequence.num_computed = 5
    sequence.set_context(2, [3, 4])
    assert sequence.tokens == [1, 2, 3, 4, 5], "what was drafted behind the context stays"
    assert sequence.set_context(2, [3, 9]) == 3
    assert (sequence.tokens, sequence.num_computed) == ([1, 2, 3, 9], 3)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=8),
)
def test_set_context_always_leaves_the_context_in_front(prompt: list[int], contexts: list[list[int]]) -> None:
    sequence = Sequence(BlockPool(16, 2), prompt)
    for context in contexts:
        before, computed = list(sequence.tokens), sequence.num_computed
        sequence.set_context(len(prompt), context)
        whole = prompt + context
        assert sequence.tokens[: len(whole)] == whole
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), None)
        if same is None:
            assert sequence.num_computed == computed, "nothing that agrees is thrown away"
        else:
            assert sequence.num_computed == min(computed, same)
        sequence.block_table.grow(len(sequence.tokens))
        sequence.num_computed = len(sequence.tokens)
        sequence.check()


class SequencesOnOnePool(RuleBasedStateMachine):
    """Sequences grow, compute, truncate, fork, share, are found again and go, in any order, on a pool that
    may run out.  A slot remembers the tokens it was computed from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 3)
        self.sequences: list[Sequence] = []
        self.slots: dict[int, tuple[object, ...]] = {}

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=10), salt=st.sampled_from([None, "", "a"]))
    def start(self, prompt: list[int], salt: str | None) -> None:
        self.sequences.append(Sequence(self.pool, prompt, salt))
        self.sequences[-1].salt = salt  # type: ignore[attr-defined]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def write(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        sequence.tokens.extend(tokens)
        sequence.context_len = len(sequence.tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        start = sequence.num_computed
        end = data.draw(st.integers(start, len(sequence.tokens)))
        missing = sequence.block_table.missing(start, end)
        available = self.pool.num_available
        try:
            copies = sequence.prepare_write(start, end)
        except OutOfBlocks:
            assert missing > available
            return
        assert missing <= available, "missing() foretells what is allocated"
        for source, fresh in copies:
            for i in range(3):
                self.slots[fresh * 3 + i] = self.slots.get(source * 3 + i, ())
        for position in range(start, end):
            block = sequence.block_table.ids[position // 3]
            assert not self.pool.is_shared(block), "never write a shared block"
            key = (sequence.salt, *sequence.tokens[: position + 1])
            self.slots[sequence.block_table.slot(position)] = key
        sequence.computed(end)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.sequences)).register()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        start, limit = sequence.num_computed, data.draw(st.integers(0, len(sequence.tokens)))
        found = sequence.take_cached(limit)
        assert found % 3 == 0
        assert found == 0 or start + found == sequence.num_computed <= limit

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        sequence, other = (data.draw(st.sampled_from(self.sequences)) for _ in range(2))
        if sequence is not other and sequence.salt == other.salt:
            sequence.take_from(other, len(sequence.tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), length=st.integers(0, 20))
    def truncate(self, data: st.DataObject, length: int) -> None:
        data.draw(st.sampled_from(self.sequences)).truncate(length)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), position=st.integers(1, 20))
    def want_row(self, data: st.DataObject, position: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        if position <= len(sequence.tokens):
            sequence.want_row(position)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        other = sequence.fork()
        assert other.tokens == sequence.tokens
        other.salt = sequence.salt
        self.sequences.append(other)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        sequence.release()
        self.sequences = [kept for kept in self.sequences if kept is not sequence]

    @invariant()
    def sequences_and_pool_are_whole(self) -> None:
        self.pool.check()
        for sequence in self.sequences:
            sequence.check()
            for position in range(sequence.num_computed):
                key = (sequence.salt, *sequence.tokens[: position + 1])
                assert self.slots[sequence.block_table.slot(position)] == key, "a slot holds something else"
        held = {block for sequence in self.sequences for block in sequence.block_table.ids}
        assert len(held) + self.pool.num_available == self.pool.total, "a block that nobody holds is lost"


TestSequencesOnOnePool = SequencesOnOnePool.TestCase
TestSequencesOnOnePool.settings = settings(max_examples=60, stateful_step_count=40)
