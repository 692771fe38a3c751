"""Prompts' attention by flash-attn, where the caller chose it: which rows it computes, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from nudging.core.work import Work
from nudging.errors import BadRequest
from nudging.executor.cuda_graphs import MAX_ROWS
from nudging.kernels.flash_attn import DTYPES, HEAD_DIM_STEP, MAX_HEAD_DIM, PACKAGES, FlashAttn, Ragged
from nudging.kernels.paged_attention import paged_attention
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder

CHOICES = ("nudging", "flash-attn")
REMEDY = "use prefill_attention='nudging'"


def read_prefill_attention(name: str, device: torch.device, block_size: int) -> FlashAttn | None:
    """The package that "flash-attn" finds for the device; None for "nudging".  Raises BadRequest."""
    if name == "nudging":
        return None
    if name != "flash-attn":
        raise BadRequest(f"prefill_attention is {name!r}; it must be one of {', '.join(CHOICES)}")
    if device.type != "cuda":
        raise BadRequest(
            f"prefill_attention is {name!r}, which needs a CUDA GPU, and the device is {device}; {REMEDY}"
        )
    gpu, _ = torch.cuda.get_device_capability(device)
    refusals = []
    for package in PACKAGES:
        opened = package.open(gpu, block_size)
        if isinstance(opened, FlashAttn):
            return opened
        refusals.append(opened)
    raise BadRequest(f"prefill_attention is {name!r} and {'; '.join(refusals)}; change that or {REMEDY}")


def check_prefill_attention(flash: FlashAttn | None, decoders: Iterable[Decoder]) -> None:
    """Raise BadRequest for a model that the package cannot serve."""
    for decoder in decoders if flash is not None else ():
        dtype, head_dim = decoder.dtype, decoder.config.head_dim
        if dtype not in DTYPES:
            raise BadRequest(
                f"prefill_attention is 'flash-attn', which takes bfloat16 or float16, and a model is "
                f"{str(dtype).removeprefix('torch.')}; give dtype='bfloat16' or {REMEDY}"
            )
        if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
            raise BadRequest(
                f"prefill_attention is 'flash-attn', which takes heads of a multiple of {HEAD_DIM_STEP} "
                f"channels up to {MAX_HEAD_DIM}, and a model's have {head_dim}; {REMEDY}"
            )


class Part(NamedTuple):
    """Some sequences of a batch, and the rows [n] int64 they own; None for all."""

    rows: Tensor | None
    sequences: Ragged

    def of(self, q: Tensor) -> Tensor:
        return q if self.rows is None else q.index_select(0, self.rows)


class MixedAttention:
    """One pass's attention: `prompts` by flash-attn, `others` by the op."""

    def __init__(self, flash: FlashAttn, prompts: Part, others: Part | None) -> None:
        self._flash = flash
        self._prompts = prompts
        self._others = others

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, window: int, soft_cap: float
    ) -> Tensor:
        """[rows, heads, head_dim] in q's dtype; arguments as those of `paged_attention`."""
        rest = (scale, window, soft_cap)
        prompts, others = self._prompts, self._others
        read = self._flash.attend(prompts.of(q), k_cache, v_cache, prompts.sequences, *rest)
        if others is None or prompts.rows is None or others.rows is None:
            return read
        tables, starts, _, lengths, *_ = others.sequences
        written = paged_attention(others.of(q), k_cache, v_cache, tables, starts, lengths, *rest)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return out.index_copy_(0, prompts.rows, read).index_copy_(0, others.rows, written)


def with_prefill(flash: FlashAttn, batch: Batch, works: Sequence[Work]) -> Batch:
    """The works' batch with flash-attn for the sequences of more than MAX_ROWS rows, where there are any.

    Those of at most MAX_ROWS rows are drafts, their verification and text being written; they stay with the
    op, as in a recorded pass.
    """
    prompts = [i for i, work in enumerate(works) if work.end - work.start > MAX_ROWS]
    others = [i for i, work in enumerate(works) if work.end - work.start <= MAX_ROWS]
    if not prompts:
        return batch
    return dataclasses.replace(
        batch,
        attention=MixedAttention(
            flash, _part(batch, works, prompts), _part(batch, works, others) if others else None
        ),
    )


def _part(batch: Batch, works: Sequence[Work], chosen: Sequence[int]) -> Part:
    """The works of these numbers."""
    device = batch.ids.device
    counts = [works[i].end - works[i].start for i in chosen]
    lengths = [works[i].end for i in chosen]
    is_whole = len(chosen) == len(works)

    def sums(numbers: Sequence[int]) -> Tensor:
        return torch.tensor([*accumulate(numbers, initial=0)], dtype=torch.int32, device=device)

    starts = [*accumulate((work.end - work.start for work in works), initial=0)]
    rows = [row for i in chosen for row in range(starts[i], starts[i + 1])]
    at = torch.tensor(chosen, device=device)
    sequences = Ragged(
        batch.block_tables if is_whole else batch.block_tables.index_select(0, at),
        batch.cu_seqlens_q if is_whole else sums(counts),
        sums(lengths),
        batch.seq_lens if is_whole else batch.seq_lens.index_select(0, at),
        max(counts),
        max(lengths),
    )
    return Part(None if is_whole else torch.tensor(rows, device=device), sequences)
