"""The statistics of a row of logits on a GPU: by parts of the vocabulary, then together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nudging.kernels.check import sizes
from nudging.kernels.gpu.common.stats import LEVELS, PART, merge_parts, part_stats
from nudging.kernels.softmax_stats import SoftmaxStats

PARTS = 16  # Parts of a program.


@triton.jit
def _softmax_parts(
    logits_ptr, stats_ptr, args_ptr, vocab, stride, parts, PARTS: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    ids = (part[:, None] << LEVELS) + tl.arange(0, 1 << LEVELS)[None, :]
    logits_ptr += row * stride
    x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    top, total, expected, arg = part_stats(x, ids, LEVELS)
    stats_ptr += row * 3 * parts
    tl.store(stats_ptr + part, top, mask=part < parts)
    tl.store(stats_ptr + parts + part, total, mask=part < parts)
    tl.store(stats_ptr + 2 * parts + part, expected, mask=part < parts)
    tl.store(args_ptr + row * parts + part, arg, mask=part < parts)


def softmax_stats(logits: Tensor) -> SoftmaxStats:
    rows, vocab = sizes("softmax_stats", "logits", logits, 2)
    if vocab == 0:
        raise ValueError("softmax_stats: vocab is 0; a row without logits has no statistics")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    parts = triton.cdiv(vocab, PART)
    stats = torch.empty((rows, 3, parts), dtype=torch.float32, device=logits.device)
    args = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    if rows > 0:
        _softmax_parts[(triton.cdiv(parts, PARTS), rows)](
            logits, stats, args, vocab, logits.stride(0), parts, PARTS, LEVELS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return SoftmaxStats(*merge_parts(stats, args))
