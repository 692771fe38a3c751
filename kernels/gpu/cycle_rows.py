"""The rows of a cycle on a GPU: a program per lane."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.cycle_rows import ALIVE, BEFORE, LAG, LAST, ROOM, STATES, WRITTEN, CycleRows


@triton.jit
def slots_of(table_ptr, position, kept, block_size, spare):
    """The slots of positions in the blocks of one table; `spare` for those that are not kept."""
    block = tl.load(table_ptr + position // block_size, mask=kept, other=0).to(tl.int64)
    return tl.where(kept, block * block_size + position % block_size, spare)


@triton.jit
def _cycle_rows(
    state_ptr, lengths_ptr, wanted_ptr, first_ptr, temperature_ptr, seed_ptr,
    guide_table_ptr, base_table_ptr, tails_ptr, guide_positions_ptr, guide_slots_ptr, guide_lens_ptr,
    base_positions_ptr, base_slots_ptr, base_lens_ptr, guide_noise_ptr, base_noise_ptr,
    base_temperature_ptr, base_seed_ptr, drafted_ptr, room_ptr,
    lanes, guide_width, base_width, drafts, block_size, guide_spare, base_spare,
    WRITTEN: tl.constexpr, ROOM: tl.constexpr, BEFORE: tl.constexpr, LAST: tl.constexpr, LAG: tl.constexpr,
    ALIVE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    written, room = tl.load(state_ptr + WRITTEN * lanes + lane), tl.load(state_ptr + ROOM * lanes + lane)
    before, last = tl.load(state_ptr + BEFORE * lanes + lane), tl.load(state_ptr + LAST * lanes + lane)
    lag, alive = tl.load(state_ptr + LAG * lanes + lane), tl.load(state_ptr + ALIVE * lanes + lane) > 0
    drafted = tl.maximum(tl.minimum(tl.load(wanted_ptr + lane), room - 1), 0)
    drafted = tl.where(alive, drafted, 0)
    guide_end = tl.load(lengths_ptr + lane) + written
    base_end = tl.load(lengths_ptr + lanes + lane) + written
    tl.store(tails_ptr + lane, before)
    tl.store(tails_ptr + lanes + lane, last)
    tl.store(drafted_ptr + lane, drafted)
    tl.store(room_ptr + lane, tl.where(alive, room, 0))
    tl.store(base_lens_ptr + lane, tl.where(alive, base_end + drafts, drafts + 1))

    row = tl.arange(0, ROWS)
    there = row <= drafts
    guide = guide_end - 2 + tl.minimum(row, tl.maximum(drafted, 1))
    guide = tl.where(alive, guide, tl.where(row < 2, row, 0))
    kept = there & alive & tl.where(row == 0, lag > 1, (row == 1) | (row <= drafted))
    slots = slots_of(guide_table_ptr + lane.to(tl.int64) * guide_width, guide, kept, block_size, guide_spare)
    # Two rows of each lane for the first pass, then one for each pass.
    at = tl.where(row < 2, FIRST * lane + row, row * lanes + lane)
    tl.store(guide_positions_ptr + at, guide.to(tl.int64), mask=there)
    tl.store(guide_slots_ptr + at, slots, mask=there)
    tl.store(guide_lens_ptr + (row - 1) * lanes + lane, guide + 1, mask=there & (row > 0))

    base = tl.where(alive, base_end - 1 + tl.minimum(row, drafted), row)
    kept = alive & (row <= drafted)
    slots = slots_of(base_table_ptr + lane.to(tl.int64) * base_width, base, kept, block_size, base_spare)
    at = lane * (drafts + 1) + row
    tl.store(base_positions_ptr + at, base.to(tl.int64), mask=there)
    tl.store(base_slots_ptr + at, slots, mask=there)

    noise = tl.load(first_ptr + lane) + written + row
    tl.store(guide_noise_ptr + row * lanes + lane, noise, mask=row < drafts)
    tl.store(base_noise_ptr + at, noise, mask=there)
    tl.store(base_temperature_ptr + at, tl.load(temperature_ptr + lane), mask=there)
    tl.store(base_seed_ptr + at, tl.load(seed_ptr + lane), mask=there)


def cycle_rows(
    state: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    first: Tensor,
    temperature: Tensor,
    seed: Tensor,
    guide_table: Tensor,
    base_table: Tensor,
    tails: Tensor,
    drafts: int,
    block_size: int,
    guide_spare: int,
    base_spare: int,
) -> CycleRows:
    op, device = "cycle_rows", state.device
    lanes = sizes(op, "state", state, 2)[1]
    guide_width, base_width = (sizes(op, "a table", one, 2)[1] for one in (guide_table, base_table))
    arguments = (
        require(op, "state", state, (STATES, lanes), torch.int32, device),
        require(op, "lengths", lengths, (2, lanes), torch.int32, device),
        require(op, "wanted", wanted, (lanes,), torch.int32, device),
        require(op, "first", first, (lanes,), torch.int64, device),
        require(op, "temperature", temperature, (lanes,), torch.float32, device),
        require(op, "seed", seed, (lanes,), torch.int64, device),
        require(op, "guide_table", guide_table, (lanes, guide_width), torch.int32, device),
        require(op, "base_table", base_table, (lanes, base_width), torch.int32, device),
        tails,
    )
    if require(op, "tails", tails, (2, lanes), torch.int32, device) is not tails:
        raise ValueError(f"{op}: tails is not contiguous, its strides are {tails.stride()}")

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    rows, short = lanes * (drafts + 1), torch.int32
    out = CycleRows(
        empty(rows), empty(rows), empty(drafts, lanes, dtype=short),
        empty(rows), empty(rows), empty(lanes, dtype=short), empty(drafts, lanes), empty(rows),
        empty(rows, dtype=torch.float32), empty(rows), empty(lanes, dtype=short), empty(lanes, dtype=short),
    )  # fmt: skip
    if lanes > 0:
        _cycle_rows[(lanes,)](
            *arguments, *out, lanes, guide_width, base_width, drafts, block_size, guide_spare, base_spare,
            WRITTEN, ROOM, BEFORE, LAST, LAG, ALIVE, triton.next_power_of_2(drafts + 1), min(drafts + 1, 2),
            num_warps=1,
        )  # fmt: skip
    return out
