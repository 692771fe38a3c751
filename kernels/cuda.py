"""What the Triton implementations of all ops share: where they run."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def on_cuda(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`: a CUDA tensor of fp32, bf16 or fp16."""
    return x.is_cuda and x.dtype in FLOATS
