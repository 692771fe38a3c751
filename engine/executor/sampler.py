"""From logits to rows: the statistics a policy needs and the token a request picks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nudging.core.fast_path import FastPath
from nudging.core.past import NO_PAST, Past
from nudging.core.rows import Row, TokenLogprob
from nudging.core.sampling_params import SamplingParams
from nudging.core.wanted import GREEDY, Wanted
from nudging.errors import BadRequest, NumericalError
from nudging.executor.processing import processed
from nudging.kernels.sample import pick
from nudging.kernels.softmax_stats import softmax_stats


def pick_token(logits: Tensor, params: SamplingParams, seed: int, position: int, past: Past = NO_PAST) -> int:
    """The token of one row of logits [vocab] fp32 under `params`, with the noise of (seed, position).

    On the fast path a row may be anything: requests fail where its statistics are not finite.  Raises
    NumericalError where `params` leave no token of others.
    """
    if params.changes_logits:
        logits = processed(logits, params, past)
        if params.chooses_tokens:
            _check_choice(logits)
    warmth = (params.temperature, params.top_k, params.top_p, params.min_p)
    return pick(logits, *warmth, seed=seed, position=position)


def _check_choice(logits: Tensor) -> None:
    peak = float(logits.max())
    if peak == -math.inf:
        raise NumericalError(
            "no token may be written here: allowed_token_ids, bad_words and min_tokens together exclude all "
            "of them; allow more"
        )
    if not math.isfinite(peak):
        raise NumericalError(f"the logits with biases and penalties are not finite (max {peak}); lessen them")


def checked_row(logits: Any, vocab: int) -> Tensor:
    """What a policy made of logits, as [vocab] fp32 with a finite maximum.

    Raises BadRequest where it is no such row, NumericalError where it holds NaN, or no finite maximum.
    """
    try:
        row = torch.as_tensor(logits)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(f"a policy picks from {logits!r:.80}; give one row of logits, [{vocab}]") from error
    if row.shape != (vocab,) or row.is_complex():
        raise BadRequest(
            f"a policy picks from {list(row.shape)} of {row.dtype}; give one row of logits, [{vocab}]"
        )
    row = row.detach().float()
    peak = float(row.max())
    if not math.isfinite(peak):
        raise NumericalError(f"the logits that a policy picks from are not finite (max {peak})")
    return row


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


def tell(fast_path: FastPath, logits: Tensor) -> Tensor:
    """Give the fast path the rows that the first lines of `logits` [rows, vocab] make; returns the others."""
    count, size = fast_path.core.uniform()
    mine, others = logits[:count], logits[count:]
    if size == 0:
        fast_path.take(decide(mine, wanted_by(fast_path)))
        return others
    if size < logits.shape[1]:
        mine = mine[:, :size].contiguous()
    stats = softmax_stats(mine)
    top, peak, lse = (part if part.is_cpu else part.cpu() for part in (stats.argmax, stats.max, stats.lse))
    picked = [
        (at, pick_token(mine[at], request.params, request.seed, position))
        for at, request, position in fast_path.sampled()
    ]
    failed = fast_path.core.take_statistics(top.data_ptr(), peak.data_ptr(), lse.data_ptr(), picked)
    fast_path.fail([(*where, row_of(0, 0, float(peak[at]), float(lse[at]))) for *where, at in failed])
    return others


def wanted_by(fast_path: FastPath) -> list[Wanted]:
    """What the rows of carried requests are asked for."""
    wanted = [Wanted(GREEDY, 0, 0, size, False) for size in fast_path.core.vocabularies()]
    for at, request, position in fast_path.sampled():
        wanted[at] = Wanted(request.params, request.seed, position, wanted[at].vocab_size, False)
    return wanted


def _row(logits: Tensor, line: int, want: Wanted, top: int, peak: float, lse: float) -> Row | NumericalError:
    """One line of `logits` as a row; most requests need no more of it than its statistics."""
    row = row_of(top, top, peak, lse)
    if isinstance(row, NumericalError) or (want.is_plain and not want.keep_logits):
        return row
    try:
        token = top if want.is_plain else pick_token(logits[line], *want[:3], want.past)
    except NumericalError as error:
        return error
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
    top: dict[int, float] = {}
    if num_top:
        # Those that may be among them are few: a whole vocabulary takes long to sort.
        least = logprobs.topk(min(num_top, len(logprobs))).values[-1]
        ids = (logprobs >= least).nonzero()[:, 0]
        values, order = torch.sort(logprobs[ids], descending=True, stable=True)
        top = dict(zip(ids[order[:num_top]].tolist(), values[:num_top].tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


class TorchSampler:
    """What `nudging.core.executor.Sampler` asks for, on torch's tensors."""

    def pick(
        self, logits: Any, vocab: int, params: SamplingParams, seed: int, position: int, past: Past
    ) -> int:
        return pick_token(checked_row(logits, vocab), params, seed, position, past)

    def logprob(self, logits: Any, token: int, num_top: int) -> TokenLogprob:
        return logprob_of(logits, token, num_top)
