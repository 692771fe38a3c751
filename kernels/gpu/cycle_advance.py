"""The texts after a cycle on a GPU: a program per lane."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.cycle_rows import ALIVE, BEFORE, LAG, LAST, ROOM, STATES, WRITTEN
from nudging.kernels.draft_limits import WIDTH as TOKENS
from nudging.kernels.draft_verify import RUNNING
from nudging.kernels.lm_head import LINES, LSE, MAX


@triton.jit
def is_finite(bits):
    """Whether fp32 numbers given as their bits are finite: not all bits of the exponent are set."""
    return (bits & 0x7F800000) != 0x7F800000


@triton.jit
def _cycle_advance(
    state_ptr, drafted_ptr, tokens_ptr, count_ptr, finish_ptr, guide_ptr, base_ptr,
    lanes, drafts, line_stride, MAX: tl.constexpr, LSE: tl.constexpr,
    WRITTEN: tl.constexpr, ROOM: tl.constexpr, BEFORE: tl.constexpr, LAST: tl.constexpr, LAG: tl.constexpr,
    ALIVE: tl.constexpr, RUNNING: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    DRAFTING: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    count, drafted = tl.load(count_ptr + lane), tl.load(drafted_ptr + lane)
    written, room = tl.load(state_ptr + WRITTEN * lanes + lane), tl.load(state_ptr + ROOM * lanes + lane)
    before, last = tl.load(state_ptr + BEFORE * lanes + lane), tl.load(state_ptr + LAST * lanes + lane)
    tokens_ptr += lane * WIDTH
    last_written = tl.load(tokens_ptr + count - 1, mask=count > 0, other=0)
    one_before = tl.load(tokens_ptr + count - 2, mask=count > 1, other=0)

    row = tl.arange(0, ROWS)
    guide_ptr += lane + row * lanes
    counts = row < drafted
    top = tl.load(guide_ptr + MAX * line_stride, mask=counts, other=0)
    lse = tl.load(guide_ptr + LSE * line_stride, mask=counts, other=0)
    bad = tl.sum((is_finite(top) & is_finite(lse) == 0).to(tl.int32), 0)
    counts = row <= drafted
    rows = lanes * (drafts + 1)
    base_ptr += lane * (drafts + 1) + row
    top = tl.load(base_ptr + MAX * rows, mask=counts, other=0)
    lse = tl.load(base_ptr + LSE * rows, mask=counts, other=0)
    bad += tl.sum((is_finite(top) & is_finite(lse) == 0).to(tl.int32), 0)

    goes_on = (bad == 0) & (tl.load(finish_ptr + lane) == RUNNING) & (count > 0)
    goes_on = goes_on & (room - count > DRAFTING)
    alive = tl.load(state_ptr + ALIVE * lanes + lane)
    state_ptr += lane
    tl.store(state_ptr + WRITTEN * lanes, written + count)
    tl.store(state_ptr + ROOM * lanes, room - count)
    tl.store(state_ptr + LAST * lanes, tl.where(count > 0, last_written, last))
    tl.store(state_ptr + BEFORE * lanes, tl.where(count > 1, one_before, tl.where(count == 1, last, before)))
    tl.store(state_ptr + LAG * lanes, tl.where(count == drafted + 1, 1 + DRAFTING, 1))
    tl.store(state_ptr + ALIVE * lanes, tl.where(goes_on, alive, 0))


def cycle_advance(
    state: Tensor,
    drafted: Tensor,
    tokens: Tensor,
    written: Tensor,
    finish: Tensor,
    guide_said: Tensor,
    base_said: Tensor,
) -> None:
    op, device = "cycle_advance", state.device
    _, drafts, lanes = sizes(op, "guide_said", guide_said, 3)
    if require(op, "state", state, (STATES, lanes), torch.int32, device) is not state:
        raise ValueError(f"{op}: state is not contiguous, its strides are {state.stride()}")
    shape, strides = (LINES, drafts, lanes), guide_said.stride()
    if guide_said.shape != shape or guide_said.dtype != torch.int32 or strides[1:] != (lanes, 1):
        guide_said = require(op, "guide_said", guide_said, shape, torch.int32, device)
    arguments = (
        require(op, "drafted", drafted, (lanes,), torch.int32, device),
        require(op, "tokens", tokens, (lanes, TOKENS), torch.int32, device),
        require(op, "written", written, (lanes,), torch.int32, device),
        require(op, "finish", finish, (lanes,), torch.int8, device),
        guide_said,
        require(op, "base_said", base_said, (LINES, lanes * (drafts + 1)), torch.int32, device),
    )
    if lanes > 0:
        _cycle_advance[(lanes,)](
            state, *arguments, lanes, drafts, guide_said.stride(0), MAX, LSE,
            WRITTEN, ROOM, BEFORE, LAST, LAG, ALIVE, RUNNING, TOKENS,
            triton.next_power_of_2(drafts + 1), min(drafts, 1), num_warps=1,
        )  # fmt: skip
