"""What a caller gets back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum

from nudging.core.request import Piece, Request
from nudging.core.rows import TokenLogprob


@dataclass(frozen=True)
class Segment:
    """A run of tokens by one author, and the text that became final with them."""

    author: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Stats:
    """What one output cost.  A pass is one forward of a role's model in which this request had tokens.

    `nudged_tokens` counts tokens not written by the base; `drafted` and `accepted` count tokens computed
    ahead and those of them that became text; `accepted_lengths[n]` counts the drafts of which n tokens did;
    `cached_tokens` counts prompt tokens that were not computed because another request had, of all roles
    together; `preemptions` how often the request gave its cache back to a higher-ranked one, `recomputed` the
    tokens it computed again for that.  `ttft_ms` and `tpot_ms` are milliseconds to the first token, and for
    each later one on average (None where there was none).
    """

    tokens: int
    nudged_tokens: int
    nudge_rate: float
    base_passes: int
    guide_passes: int
    drafted: int
    accepted: int
    ttft_ms: float | None
    tpot_ms: float | None
    accepted_lengths: tuple[int, ...] = ()
    cached_tokens: int = 0
    preemptions: int = 0
    recomputed: int = 0


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.  `authors[i]` is the role that wrote `token_ids[i]`; `text` is None without a
    tokenizer.

    `finish_reason` is "stop", "length", "abort" or "error"; in the last case `error` says why.
    `stop_reason` is the stop string or the id of `stop_token_ids` that ended the text; None where its end of
    sequence did, or nothing did.  `cumulative_logprob` is the sum of `logprobs`, None where these were not
    asked for.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    authors: tuple[str, ...]
    segments: tuple[Segment, ...]
    finish_reason: str
    stats: Stats
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: BaseException | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None

    @classmethod
    def written(cls, author: str, ids: list[int], text: str | None) -> CompletionOutput:
        """Tokens that no model wrote: they cost nothing."""
        free = Stats(len(ids), 0, 0.0, 0, 0, 0, 0, None, None)
        segment = Segment(author, text or "", tuple(ids))
        return cls(0, text, tuple(ids), (author,) * len(ids), (segment,), "stop", free)


@dataclass(frozen=True)
class PromptOutput:
    """One role's prompt as its model read it: the text (None where ids were given), and the ids."""

    text: str | None
    token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """How many tokens the prompt has, special ones included."""
        return len(self.token_ids)


@dataclass(frozen=True)
class RequestOutput:
    """All continuations of one prompt, in the order of their index.

    `prompt_logprobs`, where SamplingParams ask for them: one for each token of the base's prompt, or of the
    first role's where the policy has no base; None for the first one.  Fewer, if the request ended before.
    `prompts`: what each role of the policy read, its chat template applied; `prompt` and `prompt_token_ids`
    are the base's, or the first role's.
    """

    request_id: str
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    prompts: Mapping[str, PromptOutput] = field(default_factory=dict)

    @property
    def prompt(self) -> str | None:
        """The prompt's text; None where ids were given."""
        return self._first.text

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt's ids, special ones included."""
        return self._first.token_ids

    @property
    def _first(self) -> PromptOutput:
        return self.prompts["base"] if "base" in self.prompts else next(iter(self.prompts.values()))


@dataclass(frozen=True)
class Delta:
    """What was added to one continuation since the last delta; `finish_reason` is set on its last one.

    `segments` is the same text by author.  Text can become final after its token (half a character), so a
    segment may be text without a token.  `logprobs`, where SamplingParams ask for them: one for each token.
    `error`, on the last delta: why a text ended that did not come to its end.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    authors: tuple[str, ...]
    finish_reason: str | None = None
    segments: tuple[Segment, ...] = ()
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: BaseException | None = None
    stop_reason: str | int | None = None


def completion_output(request: Request, index: int) -> CompletionOutput:
    """The result of a finished request."""
    assert request.finish_reason is not None, f"{request.id} is not finished"
    pieces = request.pieces
    logprobs = logprobs_of(request, pieces)
    return CompletionOutput(
        index=index,
        text=request.text if request.tokenizer is not None else None,
        token_ids=tuple([piece.token for piece in pieces]),
        authors=tuple([piece.author for piece in pieces]),
        segments=segments(pieces, request.tail),
        finish_reason=request.finish_reason,
        stats=stats(request),
        logprobs=logprobs,
        error=request.error,
        stop_reason=request.stop_reason,
        cumulative_logprob=None if logprobs is None else fsum(each.logprob for each in logprobs if each),
    )


def request_output(request_id: str, requests: Sequence[Request]) -> RequestOutput:
    """The results of a prompt's requests, all finished."""
    read = requests[0].prompt_logprobs
    return RequestOutput(
        request_id,
        tuple([completion_output(request, i) for i, request in enumerate(requests)]),
        None if read is None else tuple(read),
        {name: PromptOutput(prompt.text, tuple(prompt.ids)) for name, prompt in requests[0].prompts.items()},
    )


def logprobs_of(request: Request, pieces: list[Piece]) -> tuple[TokenLogprob | None, ...] | None:
    """Those of the pieces' tokens; None where they were not asked for."""
    return None if request.params.logprobs is None else tuple([piece.logprob for piece in pieces])


def segments(pieces: list[Piece], tail: str, author_before: str = "base") -> tuple[Segment, ...]:
    """The pieces joined by author; what became final at the very end belongs to the last author."""
    runs: list[tuple[str, list[Piece]]] = []
    for piece in pieces:
        if not runs or runs[-1][0] != piece.author:
            runs.append((piece.author, []))
        runs[-1][1].append(piece)
    if tail and not runs:
        runs.append((author_before, []))
    texts = ["".join(piece.text for piece in run) for _, run in runs]
    if texts:
        texts[-1] += tail
    return tuple(
        [
            Segment(author, text, tuple([piece.token for piece in run]))
            for (author, run), text in zip(runs, texts, strict=True)
        ]
    )


def stats(request: Request) -> Stats:
    """The counters of a finished request, as figures."""
    counters = request.counters
    tokens = len(request.pieces)
    nudged = sum(piece.author != "base" for piece in request.pieces)
    ttft = tpot = None
    if counters.first_token_at is not None and counters.finished_at is not None:
        ttft = 1e3 * (counters.first_token_at - counters.submitted_at)
        if tokens > 1:
            tpot = 1e3 * (counters.finished_at - counters.first_token_at) / (tokens - 1)
    return Stats(
        tokens=tokens,
        nudged_tokens=nudged,
        nudge_rate=nudged / tokens if tokens else 0.0,
        base_passes=counters.passes.get("base", 0),
        guide_passes=counters.passes.get("guide", 0),
        drafted=counters.drafted,
        accepted=counters.accepted,
        ttft_ms=ttft,
        tpot_ms=tpot,
        accepted_lengths=tuple(
            [counters.cycles.get(n, 0) for n in range(max(counters.cycles, default=-1) + 1)]
        ),
        cached_tokens=counters.cached,
        preemptions=counters.preemptions,
        recomputed=counters.recomputed,
    )
