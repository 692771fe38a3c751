"""The rows of a cycle and what becomes of the texts: references by hand, kernels by the references."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from nudging.kernels.cycle_advance import cycle_advance
from nudging.kernels.cycle_rows import ALIVE, CycleRows, cycle_rows
from nudging.kernels.draft_limits import WIDTH
from nudging.kernels.draft_verify import LENGTH, RUNNING, STOP
from nudging.kernels.lm_head import LINES, LSE, MAX
from tests.kernels.test_triton import on_device, pytestmark, triton
from tests.support.compare import Run
from tests.support.interpreter import DEVICE

__all__ = ["pytestmark"]


def ints(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_the_rows_of_a_cycle_by_hand() -> None:
    """Blocks of four tokens; three drafts, of which the second lane has room for one; the third is out."""
    state = ints([2, 1, 5], [9, 2, 3], [60, 61, 0], [70, 71, 0], [2, 1, 1], [1, 1, 0])
    lengths = ints([3, 6, 1], [8, 3, 1])
    tables = ints([5, 6, 7], [8, 9, 4], [0, 0, 0]), ints([1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0])
    wanted, first, tails = torch.tensor([3, 3, 3]).int(), torch.tensor([0, 10, 0]), torch.zeros(2, 3).int()
    temperature, seed = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([7, -8, 9])
    rows = cycle_rows(state, lengths, wanted, first, temperature, seed, *tables, tails, 3, 4, 400, 800)
    assert rows.drafted.tolist() == [3, 1, 0]
    assert rows.room.tolist() == [9, 2, 0]
    assert tails.tolist() == [[60, 61, 0], [70, 71, 0]]
    # The guide's text is 5 and 7 tokens long; the second lane lags by one.
    assert rows.guide_positions.tolist() == [3, 4, 5, 6, 0, 1, 5, 6, 0, 6, 6, 0]
    assert rows.guide_slots.tolist() == [23, 24, 400, 38, 400, 400, 25, 400, 400, 26, 400, 400]
    assert rows.guide_lens.tolist() == [[5, 7, 2], [6, 7, 1], [7, 7, 1]]
    # The base's is 10 and 4.
    assert rows.base_positions.tolist() == [9, 10, 11, 12, 3, 4, 4, 4, 0, 1, 2, 3]
    assert rows.base_slots.tolist() == [13, 14, 15, 16, 23, 24, 800, 800, 800, 800, 800, 800]
    assert rows.base_lens.tolist() == [13, 7, 4]
    assert rows.guide_noise.tolist() == [[2, 11, 5], [3, 12, 6], [4, 13, 7]]
    assert rows.base_noise.tolist() == [2, 3, 4, 5, 11, 12, 13, 14, 5, 6, 7, 8]
    assert rows.base_temperature.tolist() == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
    assert rows.base_seed.tolist() == [7] * 4 + [-8] * 4 + [9] * 4


def test_the_rows_of_a_cycle_without_drafts_by_hand() -> None:
    """The last token of each text, where there is one token of room, too; the third lane is out."""
    state = ints([2, 1, 5], [9, 1, 3], [60, 61, 0], [70, 71, 0], [1, 1, 1], [1, 1, 0])
    lengths, table = ints([8, 3, 1], [8, 3, 1]), ints([1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0])
    wanted, first, tails = torch.zeros(3).int(), torch.tensor([0, 10, 0]), torch.zeros(2, 3).int()
    picks = torch.zeros(3), torch.tensor([7, 8, 9])
    rows = cycle_rows(state, lengths, wanted, first, *picks, table, table, tails, 0, 4, 800, 800)
    assert (rows.drafted.tolist(), rows.room.tolist()) == ([0, 0, 0], [9, 1, 0])
    assert tails.tolist() == [[60, 61, 0], [70, 71, 0]]
    assert rows.base_positions.tolist() == [9, 3, 0]
    assert rows.base_slots.tolist() == [13, 23, 800]
    assert rows.base_lens.tolist() == [10, 4, 1]
    assert rows.base_noise.tolist() == [2, 11, 5]
    assert rows.base_seed.tolist() == [7, 8, 9]


def test_the_texts_after_a_cycle_by_hand() -> None:
    """All written and one more, a correction, an end, too little room, nothing, and one that was out."""
    state = ints([4] * 6, [9, 9, 9, 5, 9, 9], [60] * 6, [70] * 6, [1, 2, 1, 1, 1, 2], [1, 1, 1, 1, 1, 0])
    tokens = torch.full((6, WIDTH), -1, dtype=torch.int32)
    tokens[:, :4] = torch.tensor([20, 21, 22, 23])
    written = torch.tensor([4, 1, 2, 4, 0, 0]).int()
    finish = torch.tensor([RUNNING, RUNNING, STOP, RUNNING, RUNNING, LENGTH]).to(torch.int8)
    said = torch.zeros(LINES, 3, 6).int(), torch.zeros(LINES, 24).int()
    drafted = torch.tensor([3, 3, 3, 3, 3, 0]).int()
    cycle_advance(state, drafted, tokens, written, finish, *said)
    assert state.tolist() == [
        [8, 5, 6, 8, 4, 4],
        [5, 8, 7, 1, 9, 9],
        [22, 70, 20, 22, 60, 60],
        [23, 20, 21, 23, 70, 70],
        [2, 1, 1, 2, 1, 1],
        [1, 1, 0, 0, 0, 0],
    ]


def test_the_texts_after_a_cycle_without_drafts_by_hand() -> None:
    """One token written, the last one there was room for, and the end of the text."""
    state = ints([4] * 3, [9, 1, 9], [60] * 3, [70] * 3, [1] * 3, [1] * 3)
    tokens = torch.full((3, WIDTH), -1, dtype=torch.int32)
    tokens[:2, 0] = 20
    written, finish = torch.tensor([1, 1, 0]).int(), torch.tensor([RUNNING, LENGTH, STOP]).to(torch.int8)
    said = torch.zeros(LINES, 0, 3).int(), torch.zeros(LINES, 3).int()
    cycle_advance(state, torch.zeros(3).int(), tokens, written, finish, *said)
    assert state.tolist() == [[5, 5, 4], [8, 0, 9], [70, 70, 60], [20, 20, 70], [1, 1, 1], [1, 0, 0]]
    state[1, 0], state[5] = 2, 1
    cycle_advance(state, torch.zeros(3).int(), tokens, written, torch.zeros(3).to(torch.int8), *said)
    assert state[5].tolist() == [1, 0, 0], "room for one more token is enough, no room or no token is not"


def advanced(advance: Run, arguments: tuple[Tensor, ...]) -> Tensor:
    """The state after the cycle."""
    state, *rest = on_device(arguments)
    state = state.clone()
    assert advance(state, *rest) is None
    return state.cpu()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lane_whose_row_is_not_finite_waits_for_the_host(bad: float) -> None:
    lanes, drafts = 2, 3
    state = ints([4] * lanes, [9] * lanes, [60] * lanes, [70] * lanes, [1] * lanes, [1] * lanes)
    tokens = torch.full((lanes, WIDTH), 20, dtype=torch.int32)
    one, running = torch.ones(lanes).int(), torch.zeros(lanes).to(torch.int8)
    bits = torch.tensor(bad).view(torch.int32)
    for drafted in (2, 3):
        counting = torch.full((lanes,), drafted).int()
        for row in range(drafts + 1):
            for column in (MAX, LSE):
                guide, base = (
                    torch.zeros(LINES, *shape).int() for shape in ((drafts, lanes), (lanes * (drafts + 1),))
                )
                base[column, drafts + 1 + row] = bits
                wanted = [1, int(row > drafted)]
                arguments = (state, counting, tokens, one, running, guide, base)
                for advance in (cycle_advance.reference, triton("cycle_advance")):
                    assert advanced(advance, arguments)[ALIVE].tolist() == wanted
                if row < drafts:
                    base.zero_()
                    guide[column, row, 1] = bits
                    wanted = [1, int(row >= drafted)]
                    for advance in (cycle_advance.reference, triton("cycle_advance")):
                        assert advanced(advance, arguments)[ALIVE].tolist() == wanted


def a_state(rng: random.Random, lanes: int) -> Tensor:
    columns = [
        [rng.randint(0, 9), rng.randint(0, 12), *rng.choices(range(90), k=2), *(rng.randint(1, 2), 1)]
        for _ in range(lanes)
    ]
    state = torch.tensor(columns, dtype=torch.int32).T.contiguous()
    state[5, rng.randrange(lanes)] = 0
    return state


@pytest.mark.parametrize("drafts", [0, 1, 2, 3, 8])
def test_triton_gives_the_references_rows_and_texts(drafts: int) -> None:
    rng = random.Random(drafts)
    lanes, block_size = 5, 4
    state = a_state(rng, lanes)
    lengths = torch.tensor([rng.choices(range(2, 30), k=lanes) for _ in range(2)]).int()
    wanted = torch.tensor(rng.choices(range(min(drafts, 1), drafts + 1), k=lanes)).int()
    tables = (torch.randint(0, 90, (lanes, width), dtype=torch.int32) for width in (16, 14))
    first = torch.tensor(rng.choices(range(2**32 - 99), k=lanes))
    tails = torch.zeros(2, lanes).int(), torch.zeros(2, lanes).int().to(DEVICE)
    picks = torch.rand(lanes), torch.randint(-(2**63), 2**63 - 1, (lanes,))
    before, rest = (state, lengths, wanted, first, *picks, *tables), (drafts, block_size, 400, 800)
    want = cycle_rows.reference(*before, tails[0], *rest)
    got = triton("cycle_rows")(*on_device(before), tails[1], *rest)
    assert torch.equal(tails[0], tails[1].cpu())
    for name, one, other in zip(CycleRows._fields, got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other), name
    tokens = torch.randint(0, 90, (lanes, WIDTH), dtype=torch.int32)
    written = torch.tensor([rng.randint(0, int(n) + 1) for n in want.drafted]).int()
    finish = torch.tensor(rng.choices((RUNNING, RUNNING, STOP), k=lanes)).to(torch.int8)
    # The lines of what the guide said lie apart.
    guide_said = torch.randint(0, 99, (LINES, drafts + 2, lanes)).int()[:, 2:]
    base_said = torch.randint(0, 99, (LINES, lanes * (drafts + 1))).int()
    arguments = (state, want.drafted, tokens, written, finish, guide_said, base_said)
    found = advanced(triton("cycle_advance"), arguments)
    assert torch.equal(found, advanced(cycle_advance.reference, arguments))
    assert not torch.equal(found, state)
