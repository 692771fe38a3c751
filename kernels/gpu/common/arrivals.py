"""How programs that share a piece of work find out which is the last, and joins their parts.

Nothing is added up by atomics: the last program adds the parts in their order, so the bits are the same
whichever it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require
from nudging.kernels.cuda import ARRIVALS


@triton.jit
def arrives_last(arrivals_ptr, programs):
    """Whether this program is the last of so many here: what the others have stored can then be loaded.

    The count is zero before the first comes, and again when the last has come.
    """
    # All threads have stored, before the one that counts says so to the device.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


def check_arrivals(op: str, arrivals: Tensor, like: Tensor) -> Tensor:
    """ValueError unless there are counts enough for any call."""
    if arrivals.dim() != 1 or len(arrivals) < ARRIVALS:
        raise ValueError(
            f"{op}: arrivals is {tuple(arrivals.shape)}, it must have at least {ARRIVALS} entries"
        )
    return require(op, "arrivals", arrivals, tuple(arrivals.shape), torch.int32, like.device)
