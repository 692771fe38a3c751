"""Nudging replayed over a draft: what the policy writes where the models' rows are already there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import on_cuda
from .draft_limits import LOOKAHEAD, WIDTH
from .op import Op

# What `marks` says of a token id, as bits.
STARTS_WITH_SPACE, BASE_EOS, GUIDE_EOS = 1, 2, 4
# `finish`; the owners of a token are 0, the base, and 1, the guide.
RUNNING, STOP, LENGTH = 0, 1, 2


class Verified(NamedTuple):
    """Per sequence: `tokens` [seqs, WIDTH] int32 and their `owners` int8, the first `written` [seqs] of them.

    `accepted` of those are the guide's continuation, all or all but the last; `last` is the last one, -1
    where there is none; `finish` int8 is RUNNING, STOP or LENGTH.  Behind them stands -1.
    """

    tokens: Tensor
    owners: Tensor
    written: Tensor
    accepted: Tensor
    last: Tensor
    finish: Tensor


def unsure(top: float, lse: float, threshold: float, or_equal: bool) -> bool:
    """Whether a base whose top-1 probability is exp(top - lse) leaves the word to the guide."""
    prob = math.exp(top - lse)
    return prob < threshold or (or_equal and prob == threshold)


@Op
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
    """The steps of Nudging (arXiv 2410.09300) from the text so far, until a row is missing or the text ends.

    guide_token: [seqs, 1 to WIDTH] int32, wherever they lie, the guide's own continuation of the text,
    `guided` [seqs] int32 of it known; base_max, base_lse: [seqs, 1 to MAX_DRAFT + 1] fp32 and base_token,
    int32: the base's statistics and pick after i tokens of that continuation, i = 0..`drafted` [seqs] int32,
    which may be -1.
    threshold: [seqs] fp64; or_equal, by_word, ignore_eos: [seqs] bool, the comparator "<=", the granularity
    and whether the ends of sequence count; room: [seqs] int32, how many tokens may be written; marks: [vocab]
    uint8, the bits STARTS_WITH_SPACE, BASE_EOS and GUIDE_EOS.

    A step asks the base unless the threshold is above 1.  Where its top-1 probability exp(max - lse), in
    fp64, is not below the threshold, its pick is written, and ends the replay unless the guide says the same.
    Else the guide writes: one token, or, by word, its next LOOKAHEAD tokens, cut where one after the first
    starts with a space; if an end of sequence is among them, all that stands before it.  The end of sequence
    of whoever writes ends the text ("stop") and is not written.
    Stop tokens and stop strings are the host's: what was written behind one is simply dropped.
    """
    seqs = len(drafted)
    tokens = torch.full((seqs, WIDTH), -1, dtype=torch.int32)
    owners = torch.full((seqs, WIDTH), -1, dtype=torch.int8)
    ends = torch.empty(seqs, 4, dtype=torch.int32)
    marked: list[int] = marks.tolist()
    settings = (threshold, or_equal, by_word, ignore_eos, room)
    for s, options in enumerate(zip(*(one.tolist() for one in settings), strict=True)):
        rows = zip(base_max[s].tolist(), base_lse[s].tolist(), base_token[s].tolist(), strict=True)
        path: list[int] = guide_token[s, : int(guided[s])].tolist()
        written, finish = replay(list(rows)[: int(drafted[s]) + 1], path, marked, *options)
        for i, (token, owner) in enumerate(written):
            tokens[s, i], owners[s, i] = token, owner
        on_path = [token for token, _ in written] == path[: len(written)]
        accepted = len(written) if on_path else len(written) - 1
        ends[s] = torch.tensor([len(written), accepted, written[-1][0] if written else -1, finish])
    num_written, accepted_, last, finish_ = ends.unbind(1)
    out = (tokens, owners, num_written, accepted_, last, finish_.to(torch.int8))
    return Verified(*(one.to(drafted.device) for one in out))


def replay(
    rows: list[tuple[float, float, int]],
    path: list[int],
    marks: list[int],
    threshold: float,
    or_equal: bool,
    by_word: bool,
    ignore_eos: bool,
    room: int,
) -> tuple[list[tuple[int, int]], int]:
    """The (token, owner) that one sequence writes on `path`, and how it ends: RUNNING, STOP or LENGTH.

    `rows`: the (max, lse, pick) of the base after 0, 1, ... tokens of the path; the rest as in draft_verify.
    """
    written: list[tuple[int, int]] = []

    def is_eos(token: int, mark: int) -> bool:
        return not ignore_eos and bool(marks[token] & mark)

    while len(written) < room:
        i = len(written)
        if threshold <= 1:
            if i >= len(rows):
                return written, RUNNING
            top, lse, token = rows[i]
            if not unsure(top, lse, threshold, or_equal):
                if is_eos(token, BASE_EOS):
                    return written, STOP
                written.append((token, 0))
                if i >= len(path) or path[i] != token:
                    return written, LENGTH if len(written) == room else RUNNING
                continue
        ahead = path[i : i + (LOOKAHEAD if by_word else 1)]
        eos = next((j for j, token in enumerate(ahead) if is_eos(token, GUIDE_EOS)), None)
        if eos is None and len(ahead) < (LOOKAHEAD if by_word else 1):
            return written, RUNNING
        starts = (j for j in range(1, len(ahead)) if marks[ahead[j]] & STARTS_WITH_SPACE)
        end = eos if eos is not None else next(starts, len(ahead))
        written += [(token, 1) for token in ahead[:end]][: room - i]
        if eos is not None and len(written) < room:
            return written, STOP
    return written, LENGTH


draft_verify.impl_at(
    "triton",
    runs_on=lambda base_max, *_: on_cuda(base_max),
    at="nudging.kernels.gpu.draft_verify:draft_verify",
)
