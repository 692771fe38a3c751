"""From a model's logits to those that are sampled from: masks, biases and penalties, in one fixed order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from nudging.core.past import NO_PAST, Past
from nudging.core.sampling_params import SamplingParams


def processed(logits: Tensor, params: SamplingParams, past: Past = NO_PAST) -> Tensor:
    """A copy of logits [vocab] fp32 with what `params` ask for after `past`, before temperature and filters.

    In this order: -inf for all but the allowed ids; -inf for what `past` bans; plus the biases; tokens of
    prompt and output divided by the repetition penalty, or multiplied where they are negative; less the
    frequency penalty times a token's number in the output, and less the presence penalty for those in it.
    """
    row, size = logits.clone(), len(logits)
    if params.allowed_token_ids is not None:
        row.fill_(-math.inf)
        allowed = _at(params.allowed_token_ids, row)
        row[allowed] = logits[allowed]
    if past.banned:
        row[_at((token for token in past.banned if token < size), row)] = -math.inf
    if params.logit_bias:
        row[_at(params.logit_bias, row)] += row.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1:
        # Of an embedding that is padded further than another one's, a prompt may know ids that no row has.
        seen = _at((token for token in {*past.prompt, *past.output} if token < size), row)
        x = row[seen]
        row[seen] = torch.where(x > 0, x / params.repetition_penalty, x * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(past.output)
        amounts = [params.frequency_penalty * n + params.presence_penalty for n in counts.values()]
        row[_at(counts, row)] -= row.new_tensor(amounts)
    return row


def _at(ids: Iterable[int], row: Tensor) -> Tensor:
    """ids [n] int64 where the row is."""
    return torch.tensor(list(ids), dtype=torch.int64, device=row.device)
