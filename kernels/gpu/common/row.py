"""How a program holds one row of a tensor."""

from typing import NamedTuple

import triton

MAX_DIM = 1 << 14


class Row(NamedTuple):
    """The elements that a program holds, a power of two, and its warps: by the row's size alone."""

    block: int
    warps: int

    @classmethod
    def of(cls, op: str, dim: int) -> "Row":
        """For rows of `dim` elements; ValueError where registers cannot hold them."""
        if dim > MAX_DIM:
            raise ValueError(f"{op}: rows have {dim} elements; a program on a GPU holds at most {MAX_DIM}")
        block = triton.next_power_of_2(max(dim, 1))
        return cls(block, min(max(block // 512, 1), 32))
