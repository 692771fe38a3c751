"""What each row of a pass is asked for."""

from __future__ import annotations

from typing import NamedTuple

from nudging.core.past import NO_PAST, Past, past_of
from nudging.core.sampling_params import SamplingParams
from nudging.core.work import Work


class Wanted(NamedTuple):
    """How one row of a batch is turned into a `Row`: `position` is the output position its noise is
    keyed by, `past` what stands before it for parameters that read it.
    """

    params: SamplingParams
    seed: int
    position: int
    vocab_size: int
    keep_logits: bool
    past: Past = NO_PAST

    @property
    def is_plain(self) -> bool:
        """Whether the token picked is the likeliest one."""
        return self.params.is_greedy


GREEDY = SamplingParams(temperature=0)


def wanted_of(work: Work, vocab_size: int) -> list[Wanted]:
    """What the rows of a work are asked for; `vocab_size`: how many ids they speak of."""
    request, tokens = work.request, work.request.sequences[work.role].tokens
    params = request.params
    keep = request.facts.needs_logits or params.logprobs is not None
    begin = len(request.prompts[work.role].ids)
    wanted = []
    for end in range(work.first_row, work.end + 1):
        if end < begin and request.prompt_logprobs is not None:
            # What the prompt might have been is nobody's pick.
            wanted.append(Wanted(GREEDY, 0, 0, vocab_size, True))
            continue
        past = past_of(request, work.role, tokens[:end]) if params.reads_text else NO_PAST
        position = max(request.first_position + end - begin, 0)
        wanted.append(Wanted(params, request.seed, position, vocab_size, keep, past))
    return wanted
