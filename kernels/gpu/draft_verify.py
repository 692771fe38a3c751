"""Nudging replayed over a draft, on the device: a program per sequence walks the guide's path."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import require, sizes
from nudging.kernels.draft_limits import LOOKAHEAD, MAX_DRAFT, WIDTH
from nudging.kernels.draft_verify import BASE_EOS, GUIDE_EOS, LENGTH, STARTS_WITH_SPACE, STOP, Verified


@triton.jit
def is_unsure(top, lse, threshold, or_equal):
    """exp(top - lse) < threshold, or <=, in fp64."""
    prob = tl.exp(top.to(tl.float64) - lse.to(tl.float64))
    return (prob < threshold) | (or_equal & (prob == threshold))


@triton.jit
def clear_behind(tokens_ptr, owners_ptr, written, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """-1 behind what was written; before it, other threads may still be writing."""
    at = tl.arange(0, HELD)
    tl.store(tokens_ptr + at, -1, mask=(at >= written) & (at < WIDTH))
    tl.store(owners_ptr + at, -1, mask=(at >= written) & (at < WIDTH))


@triton.jit
def _draft_verify(
    max_ptr, lse_ptr, base_ptr, drafted_ptr, guide_ptr, guided_ptr,
    threshold_ptr, or_equal_ptr, by_word_ptr, ignore_eos_ptr, room_ptr, marks_ptr,
    tokens_ptr, owners_ptr, written_ptr, accepted_ptr, last_ptr, finish_ptr, seq_stride, path_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, LOOKAHEAD: tl.constexpr, SPACE: tl.constexpr,
    BASE_EOS: tl.constexpr, GUIDE_EOS: tl.constexpr, STOP: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    drafted, guided, room = tl.load(drafted_ptr + seq), tl.load(guided_ptr + seq), tl.load(room_ptr + seq)
    threshold, or_equal = tl.load(threshold_ptr + seq), tl.load(or_equal_ptr + seq) != 0
    by_word, counts_eos = tl.load(by_word_ptr + seq) != 0, tl.load(ignore_eos_ptr + seq) == 0
    reach = tl.where(by_word, LOOKAHEAD, 1)
    lane = tl.arange(0, LOOKAHEAD)
    tokens_ptr += seq * WIDTH
    owners_ptr += seq * WIDTH
    guide_ptr += seq * seq_stride
    i, off_path, last, finish = 0, 0, tl.full((), -1, tl.int32), 0
    running = room > 0
    while running:
        asked = threshold <= 1
        # A row that is not there is not read; what stands for it decides nothing.
        there = asked & (i <= drafted)
        top = tl.load(max_ptr + seq * ROWS + i, mask=there, other=0.0)
        lse = tl.load(lse_ptr + seq * ROWS + i, mask=there, other=0.0)
        sure = there & (is_unsure(top, lse, threshold, or_equal) == 0)
        token = tl.load(base_ptr + seq * ROWS + i, mask=sure, other=0)
        base_ends = sure & counts_eos & ((tl.load(marks_ptr + token) & BASE_EOS) != 0)

        ahead = tl.load(
            guide_ptr + (i + lane) * path_stride, mask=(lane < reach) & (i + lane < guided), other=-1
        )
        known = ahead >= 0
        mark = tl.load(marks_ptr + ahead, mask=known, other=0)
        ends = known & counts_eos & ((mark & GUIDE_EOS) != 0)
        eos = tl.min(tl.where(ends, lane, LOOKAHEAD), 0)
        starts = known & ((mark & SPACE) != 0) & (lane > 0)
        word = tl.minimum(tl.min(tl.where(starts, lane, LOOKAHEAD), 0), reach)
        guide_knows = (eos < LOOKAHEAD) | (i + reach <= guided)
        nudged = ((asked == 0) | (there & (sure == 0))) & guide_knows
        guide_ends = nudged & (eos < LOOKAHEAD)

        wanted = tl.where(guide_ends, eos, word)
        writes = tl.where(nudged, wanted, (sure & (base_ends == 0)).to(tl.int32))
        writes = tl.minimum(writes, room - i)
        new = tl.where(nudged, ahead, token)
        tl.store(tokens_ptr + i + lane, new, mask=lane < writes)
        tl.store(owners_ptr + i + lane, nudged.to(tl.int8), mask=lane < writes)
        agrees = tl.max(tl.where((lane == 0) & (ahead == token), 1, 0), 0)
        off_path = (sure & (writes > 0) & (agrees == 0)).to(tl.int32)
        last = tl.where(writes > 0, tl.max(tl.where(lane == writes - 1, new, -1), 0), last)
        i += writes
        stops = base_ends | (guide_ends & (i < room))
        finish = tl.where(stops, STOP, tl.where(i == room, LENGTH, 0))
        running = (finish == 0) & (writes > 0) & (off_path == 0)
    finish = tl.where(room <= 0, LENGTH, finish)
    clear_behind(tokens_ptr, owners_ptr, i, WIDTH, HELD)
    tl.store(written_ptr + seq, i)
    tl.store(accepted_ptr + seq, i - off_path)
    tl.store(last_ptr + seq, last)
    tl.store(finish_ptr + seq, finish)


def draft_verify(
    base_max: Tensor,
    base_lse: Tensor,
    base_token: Tensor,
    drafted: Tensor,
    guide_token: Tensor,
    guided: Tensor,
    threshold: Tensor,
    or_equal: Tensor,
    by_word: Tensor,
    ignore_eos: Tensor,
    room: Tensor,
    marks: Tensor,
) -> Verified:
    seqs, device = len(drafted), drafted.device

    def checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return require("draft_verify", name, tensor, shape, dtype, device)

    one = (seqs,)
    rows = (seqs, min(sizes("draft_verify", "base_max", base_max, 2)[1], MAX_DRAFT + 1))
    path = (seqs, min(sizes("draft_verify", "guide_token", guide_token, 2)[1], WIDTH))
    if guide_token.shape != path or guide_token.dtype != torch.int32 or guide_token.device != device:
        checked("guide_token", guide_token, path, torch.int32)
    arguments = (
        checked("base_max", base_max, rows, torch.float32),
        checked("base_lse", base_lse, rows, torch.float32),
        checked("base_token", base_token, rows, torch.int32),
        checked("drafted", drafted, one, torch.int32),
        guide_token,
        checked("guided", guided, one, torch.int32),
        checked("threshold", threshold, one, torch.float64),
        checked("or_equal", or_equal, one, torch.bool),
        checked("by_word", by_word, one, torch.bool),
        checked("ignore_eos", ignore_eos, one, torch.bool),
        checked("room", room, one, torch.int32),
        checked("marks", marks, (len(marks),), torch.uint8),
    )
    tokens = torch.empty((seqs, WIDTH), dtype=torch.int32, device=device)
    owners = torch.empty((seqs, WIDTH), dtype=torch.int8, device=device)
    written, accepted, last = (torch.empty(seqs, dtype=torch.int32, device=device) for _ in range(3))
    finish = torch.empty(seqs, dtype=torch.int8, device=device)
    if seqs > 0:
        _draft_verify[(seqs,)](
            *arguments, tokens, owners, written, accepted, last, finish,
            *guide_token.stride(), rows[1], WIDTH, triton.next_power_of_2(WIDTH), LOOKAHEAD,
            STARTS_WITH_SPACE, BASE_EOS, GUIDE_EOS, STOP, LENGTH,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return Verified(tokens, owners, written, accepted, last, finish)
