"""Attention of prompts by the flash-attn packages: an option where they are installed, never required.

Not an implementation of the op `paged_attention`: how they order additions depends on how many rows and keys
a call has, so a row has not the bits it has alone.  Sources: the interfaces and launch code of flash-attn
2.8.3 (`flash_attn_varlen_func`) and of flash-attn 3 (`flash_attn_with_kvcache` of `flash_attn_interface`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


class Ragged(NamedTuple):
    """Sequences of a batch: block_tables [seqs, max_blocks], cu_seqlens_q and cu_seqlens_k [seqs + 1], the
    running sums of query rows and of cached tokens, seq_lens [seqs]; all int32 on the device.

    max_rows, max_len: the most query rows and the most cached tokens of a sequence.
    """

    block_tables: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seq_lens: Tensor
    max_rows: int
    max_len: int


# (q [rows, heads, head_dim], k_cache, v_cache, the sequences that own all rows, scale, window, soft_cap)
Attend = Callable[[Tensor, Tensor, Tensor, Ragged, float, int, float], Tensor]


@dataclass(frozen=True)
class FlashAttn:
    """An installed package, ready to run: its name with the version, and what runs it."""

    name: str
    attend: Attend


@dataclass(frozen=True)
class Package:
    """One of the packages, with what it serves: `versions` from (at least) to (below), as major and minor;
    `gpus`: the compute capabilities' majors; `takes_block`: the block sizes, which `blocks` says in words.
    """

    distribution: str
    module: str
    function: str
    versions: tuple[tuple[int, int], tuple[int, int]]
    gpus: tuple[int, ...]
    takes_block: Callable[[int], bool]
    blocks: str
    bind: Callable[[Callable[..., Any]], Attend]

    def open(self, gpu: int, block_size: int) -> FlashAttn | str:
        """The package, or why it cannot serve `block_size` on a GPU of that compute capability's major."""
        try:
            found = version(self.distribution)
        except PackageNotFoundError:
            return f"{self.distribution} is not installed"
        least, limit = self.versions
        parts = re.match(r"(\d+)\.(\d+)", found)
        if parts is None or not least <= (int(parts[1]), int(parts[2])) < limit:
            return (
                f"{self.distribution} is {found} and must be from {_dotted(least)} to below {_dotted(limit)}"
            )
        if gpu not in self.gpus:
            majors = " or ".join(f"{major}.x" for major in self.gpus)
            return f"{self.distribution} needs compute capability {majors} and the GPU has {gpu}.x"
        if not self.takes_block(block_size):
            return f"{self.distribution} needs a block_size that is {self.blocks} and it is {block_size}"
        try:
            run = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError) as error:
            return (
                f"{self.distribution} {found} cannot be imported ({error}): install one built for this torch"
            )
        return FlashAttn(f"{self.distribution} {found}", self.bind(run))


def _dotted(parts: tuple[int, int]) -> str:
    return ".".join(map(str, parts))


def _sides(window: int) -> tuple[int, int]:
    """How many positions before and behind its own a row sees: -1 for all, which `causal` cuts behind it."""
    return (window - 1, 0) if window > 0 else (-1, -1)


def bind_2(run: Callable[..., Any]) -> Attend:
    """`flash_attn_varlen_func` of flash-attn 2: k and v are pages where there is a block table."""

    def attend(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: Ragged, scale: float, window: int, soft_cap: float
    ) -> Tensor:
        out: Tensor = run(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=seqs.cu_seqlens_q,
            cu_seqlens_k=seqs.cu_seqlens_k,
            max_seqlen_q=seqs.max_rows,
            max_seqlen_k=seqs.max_len,
            softmax_scale=scale,
            causal=True,
            window_size=_sides(window),
            softcap=soft_cap,
            block_table=seqs.block_tables,
        )
        return out

    return attend


def bind_3(run: Callable[..., Any]) -> Attend:
    """`flash_attn_with_kvcache` of flash-attn 3, whose varlen function has no block table."""

    def attend(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: Ragged, scale: float, window: int, soft_cap: float
    ) -> Tensor:
        out: Tensor = run(
            q,
            k_cache,
            v_cache,
            cache_seqlens=seqs.seq_lens,
            page_table=seqs.block_tables,
            cu_seqlens_q=seqs.cu_seqlens_q,
            max_seqlen_q=seqs.max_rows,
            softmax_scale=scale,
            causal=True,
            window_size=_sides(window),
            softcap=soft_cap,
        )
        return out

    return attend


# flash-attn 3 takes pages of any size, but of those that are a multiple of a tile's keys (at least 64) it
# reads all: a NaN that another request left behind a text's end would then be multiplied by 0, and spread.
# flash-attn 2 has soft-caps from 2.6 on.  The first package that serves is taken.
PACKAGES = (
    Package(
        "flash-attn-3",
        "flash_attn_interface",
        "flash_attn_with_kvcache",
        ((3, 0), (4, 0)),
        (9,),
        lambda size: size < 64,
        "less than 64",
        bind_3,
    ),
    Package(
        "flash-attn",
        "flash_attn",
        "flash_attn_varlen_func",
        ((2, 6), (3, 0)),
        (8, 9, 10, 12),
        lambda size: size % 256 == 0,
        "a multiple of 256",
        bind_2,
    ),
)
