"""From logits to rows: the statistics a policy needs and the token a request picks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nudging.errors import NumericalError
from nudging.kernels.sample import pick
from nudging.kernels.softmax_stats import softmax_stats
from nudging.lanes import Lanes
from nudging.params import SamplingParams
from nudging.sequence import Row


class Wanted(NamedTuple):
    """How one row of a batch is turned into a `Row`: `position` is the output position its noise is
    keyed by.
    """

    params: SamplingParams
    seed: int
    position: int
    vocab_size: int
    keep_logits: bool

    @property
    def is_plain(self) -> bool:
        """Whether the token picked is the likeliest one."""
        return self.params.is_greedy


GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a written token, and the likeliest tokens with theirs, at temperature 1."""

    token: int
    logprob: float
    top: dict[int, float]


def pick_token(logits: Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """The token of one row of logits [vocab] fp32 under `params`, with the noise of (seed, position)."""
    if params.logit_bias:
        logits = logits.clone()
        for token, bias in params.logit_bias.items():
            logits[token] += bias
    warmth = (params.temperature, params.top_k, params.top_p, params.min_p)
    return pick(logits, *warmth, seed=seed, position=position)


def decide(logits: Tensor, wanted: list[Wanted]) -> list[Row | NumericalError]:
    """One row per row of `logits` [rows, vocab] fp32; a row with NaN becomes an error and touches no
    other.
    """
    rows: list[Row | NumericalError] = [NumericalError("unreached")] * len(wanted)
    for size in {want.vocab_size for want in wanted}:
        chosen = [i for i, want in enumerate(wanted) if want.vocab_size == size]
        whole = len(chosen) == len(wanted) and size == logits.shape[1]
        part = logits if whole else logits[chosen, :size].contiguous()
        stats = softmax_stats(part)
        columns = zip(stats.argmax.tolist(), stats.max.tolist(), stats.lse.tolist(), strict=True)
        for line, (i, (top, peak, lse)) in enumerate(zip(chosen, columns, strict=True)):
            rows[i] = _row(part, line, wanted[i], top, peak, lse)
    return rows


def tell(lanes: Lanes, logits: Tensor) -> Tensor:
    """Give the lanes the rows that the first lines of `logits` [rows, vocab] make; returns the others."""
    count, size = lanes.core.uniform()
    mine, others = logits[:count], logits[count:]
    if size == 0:
        lanes.take(decide(mine, wanted_by(lanes)))
        return others
    if size < logits.shape[1]:
        mine = mine[:, :size].contiguous()
    stats = softmax_stats(mine)
    top, peak, lse = (part if part.is_cpu else part.cpu() for part in (stats.argmax, stats.max, stats.lse))
    picked = [
        (at, pick_token(mine[at], request.params, request.seed, position))
        for at, request, position in lanes.sampled()
    ]
    failed = lanes.core.take_statistics(top.data_ptr(), peak.data_ptr(), lse.data_ptr(), picked)
    lanes.fail([(number, row_of(0, 0, float(peak[at]), float(lse[at]))) for number, at in failed])
    return others


def wanted_by(lanes: Lanes) -> list[Wanted]:
    """What the rows of carried requests are asked for."""
    wanted = [Wanted(GREEDY, 0, 0, size, False) for size in lanes.core.vocabularies()]
    for at, request, position in lanes.sampled():
        wanted[at] = Wanted(request.params, request.seed, position, wanted[at].vocab_size, False)
    return wanted


def _row(logits: Tensor, line: int, want: Wanted, top: int, peak: float, lse: float) -> Row | NumericalError:
    """One line of `logits` as a row; most requests need no more of it than its statistics."""
    row = row_of(top, top, peak, lse)
    if isinstance(row, NumericalError) or (want.is_plain and not want.keep_logits):
        return row
    token = top if want.is_plain else pick_token(logits[line], want.params, want.seed, want.position)
    return Row(token, top, row.top_prob, logits[line].clone() if want.keep_logits else None)


def row_of(token: int, top: int, peak: float, lse: float) -> Row | NumericalError:
    """The row that picked `token`, its likeliest one being `top`, of logit `peak` and log-sum-exp `lse`."""
    if not math.isfinite(peak) or math.isnan(lse):
        return NumericalError(
            f"the model's logits are not finite (max {peak}, log-sum-exp {lse}); check its weights"
        )
    return Row(token, top, math.exp(peak - lse))


def logprob_of(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """The log-probability of `token` under logits [vocab] fp32, and those of the `num_top` likeliest
    tokens.
    """
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    values, ids = torch.sort(logprobs, descending=True, stable=True)
    top = dict(zip(ids[:num_top].tolist(), values[:num_top].tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
