"""Where the rows of a cycle of drafting and verifying stand, from what the device knows of each text."""

from typing import NamedTuple

import torch
from torch import Tensor

from .op import Op

# The rows of `state`: tokens written and tokens that may still be, the last two of prompt and text, how many
# of them the guide has to read, and whether the lane takes part.
WRITTEN, ROOM, BEFORE, LAST, LAG, ALIVE = range(6)
STATES = 6


class CycleRows(NamedTuple):
    """What the passes of a cycle are given; a pass's rows stand lane by lane.

    guide_positions, guide_slots: [lanes * (drafts + 1)] int64, two rows a lane for its first pass, then one
    for each further one; guide_lens: [drafts, lanes] int32; base_positions, base_slots: [lanes * (drafts +
    1)] int64; base_lens: [lanes] int32; guide_noise [drafts, lanes] and base_noise [lanes * (drafts + 1)]
    int64: the output positions whose noise the answers are picked with; base_temperature fp32, base_seed
    int64: [lanes * (drafts + 1)], each lane's own; drafted, room: [lanes] int32, how many drafts of each lane
    count, and how many tokens it may write, 0 where it takes no part.
    """

    guide_positions: Tensor
    guide_slots: Tensor
    guide_lens: Tensor
    base_positions: Tensor
    base_slots: Tensor
    base_lens: Tensor
    guide_noise: Tensor
    base_noise: Tensor
    base_temperature: Tensor
    base_seed: Tensor
    drafted: Tensor
    room: Tensor


@Op
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
    """The rows of `drafts` passes of the guide and one of the base, for each lane's text as `state` has it.

    state: [STATES, lanes] int32; lengths: [2, lanes] int32, the tokens of the guide's and the base's prompt;
    wanted: [lanes] int32, at most `drafts`, the drafts each lane wants, of which it gets at most one less
    than it has room for; first: [lanes] int64, the output position of the text's first token; temperature
    [lanes] fp32, seed [lanes] int64: how its tokens are picked; guide_table, base_table: [lanes, any] int32,
    the blocks of its cache; tails: [2, lanes] int32, where the last two tokens of each text are written to;
    guide_spare, base_spare: slots that are nobody's.

    With e tokens of prompt and text, the guide's first pass feeds tokens e - 2 and e - 1, pass i the token
    e - 1 + i; the base's feeds e - 1 to e - 1 + drafts.  What is not to be kept goes to the spare slot: the
    guide's first row where it lags by one token only, rows behind a lane's drafts, which stand where the last
    one does, and lanes that take no part, which stand at the beginning.  Where nobody drafts, what is the
    guide's says nothing.
    """
    long = state.long()
    written, room, lag = long[WRITTEN], long[ROOM], long[LAG]
    alive = long[ALIVE] > 0
    drafted = torch.where(alive, torch.minimum(wanted.long(), room - 1).clamp(min=0), 0)
    guide_end, base_end = lengths.long() + written
    row = torch.arange(drafts + 1, device=state.device)[None, :]
    own, count = alive[:, None], drafted[:, None]

    guide = guide_end[:, None] - 2 + torch.minimum(row, count.clamp(min=1))
    guide = torch.where(own, guide, torch.where(row < 2, row, 0))
    guide_kept = own & torch.where(row == 0, lag[:, None] > 1, (row == 1) | (row <= count))
    base = torch.where(own, base_end[:, None] - 1 + torch.minimum(row, count), row)
    base_kept = own & (row <= count)

    torch.stack([state[BEFORE], state[LAST]], out=tails)
    noise = first[:, None] + written[:, None] + row
    return CycleRows(
        _by_pass(guide),
        _by_pass(_slots(guide_table, guide, guide_kept, block_size, guide_spare)),
        (guide[:, 1:].T + 1).int().contiguous(),
        base.flatten(),
        _slots(base_table, base, base_kept, block_size, base_spare).flatten(),
        torch.where(alive, base_end + drafts, drafts + 1).int(),
        noise[:, :drafts].T.contiguous(),
        noise.flatten(),
        temperature.repeat_interleave(drafts + 1),
        seed.repeat_interleave(drafts + 1),
        drafted.int(),
        torch.where(alive, room, 0).int(),
    )


def _slots(table: Tensor, positions: Tensor, kept: Tensor, block_size: int, spare: int) -> Tensor:
    """The slots of positions [lanes, any] in each lane's blocks; `spare` for those that are not kept."""
    there = torch.where(kept, positions, 0)
    blocks = table.long().gather(1, there // block_size)
    return torch.where(kept, blocks * block_size + there % block_size, spare)


def _by_pass(rows: Tensor) -> Tensor:
    """The guide's rows [lanes, drafts + 1]: the first pass's two of each lane, then each further pass's."""
    return torch.cat([rows[:, :2].flatten(), rows[:, 2:].T.flatten()])


cycle_rows.impl_at(
    "triton",
    runs_on=lambda state, *_: state.is_cuda,
    at="nudging.kernels.gpu.cycle_rows:cycle_rows",
)
