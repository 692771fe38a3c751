"""What every implementation asks of its arguments before it hands out their addresses."""

import torch
from torch import Tensor

CPU = torch.device("cpu")


def sizes(op: str, name: str, tensor: Tensor, dims: int) -> torch.Size:
    """`tensor.shape`; ValueError unless it has just so many dimensions."""
    shape = tensor.shape
    if len(shape) != dims:
        raise ValueError(f"{op}: {name} is {tuple(shape)}, it must have {dims} dimensions")
    return shape


def require(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> Tensor:
    """`tensor`, dense; ValueError unless it is of just this shape and dtype, on that device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
            f"not {shape} {dtype} on {device} as the other arguments ask for"
        )
    return tensor.contiguous()
