"""What the device knows of each text after a cycle of drafting and verifying."""

import torch
from torch import Tensor

from .cycle_rows import ALIVE, BEFORE, LAG, LAST, ROOM, WRITTEN
from .draft_verify import RUNNING
from .lm_head import MAX
from .op import Op


@Op
def cycle_advance(
    state: Tensor,
    drafted: Tensor,
    tokens: Tensor,
    written: Tensor,
    finish: Tensor,
    guide_said: Tensor,
    base_said: Tensor,
) -> None:
    """Move `state`, [STATES, lanes] int32 as in cycle_rows, on to the next cycle, in place.

    drafted: [lanes] int32, as cycle_rows gave it; tokens [lanes, WIDTH] int32, written [lanes] int32, finish
    [lanes] int8: as draft_verify gave them; guide_said: [LINES, drafts, lanes] int32, its lines
    anywhere, and base_said: [LINES, lanes * (drafts + 1)] int32: what lm_head said of the rows.

    The guide has read all but the last token of its drafts: where all of them and one more were written it
    lags by two tokens, else by one, as where nobody drafts.  A lane takes part no more once its text has
    ended, has no room, or for drafting room for one token only, or a row that counts is not finite: then the
    host looks at it first.
    """
    _, drafts, lanes = guide_said.shape
    row = torch.arange(drafts + 1, device=state.device)
    guide_ok = guide_said[MAX:].view(torch.float32).isfinite().all(dim=0)
    base_ok = base_said[MAX:].view(torch.float32).isfinite().all(dim=0).view(lanes, drafts + 1)
    is_finite = (guide_ok | (row[:drafts, None] >= drafted)).all(dim=0)
    is_finite &= (base_ok | (row > drafted[:, None])).all(dim=1)

    def written_at(index: Tensor, otherwise: Tensor) -> Tensor:
        found = tokens.gather(1, index.clamp(min=0).long()[:, None])[:, 0]
        return torch.where(index < 0, otherwise, found)

    out = torch.empty_like(state)
    out[WRITTEN], out[ROOM] = state[WRITTEN] + written, state[ROOM] - written
    out[LAST] = written_at(written - 1, state[LAST])
    out[BEFORE] = written_at(written - 2, torch.where(written == 1, state[LAST], state[BEFORE]))
    out[LAG] = 1 + ((written == drafted + 1) & (drafts > 0))
    goes_on = is_finite & (finish == RUNNING) & (written > 0) & (out[ROOM] > min(drafts, 1))
    out[ALIVE] = state[ALIVE] * goes_on
    state.copy_(out)


cycle_advance.impl_at(
    "triton",
    runs_on=lambda state, *_: state.is_cuda,
    at="nudging.kernels.gpu.cycle_advance:cycle_advance",
)
