"""What the Triton implementations of all ops share: where they run, what they count by."""

import torch
from torch import Tensor

# An op that takes `arrivals` splits its work among programs, of which the last to arrive joins the parts, in
# one launch instead of two: [at least ARRIVALS] int32 of zeros, which are zeros again afterwards.  Calls that
# share them must not run at the same time.
ARRIVALS = 512

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def on_cuda(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`: a CUDA tensor of fp32, bf16 or fp16."""
    return x.is_cuda and x.dtype in FLOATS
