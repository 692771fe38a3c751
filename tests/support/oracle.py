"""Straight-line twins of the policies: no cache, no batch, no engine.  Every step reads the whole text anew.

The engine must write what is written here, token for token and author for author.  Roles are plain callables.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nudging.kernels.sample import pick
from nudging.kernels.softmax_stats import softmax_stats

LOOKAHEAD = 16
MAX_ROUNDS = 150


@dataclass(frozen=True)
class Params:
    """How tokens are drawn and when a text ends, as in SamplingParams; `seed` is a number here, bad words are
    ids, and `keeps_stop` is include_stop_str_in_output.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    keeps_stop: bool = False

    @property
    def changes_rows(self) -> bool:
        """Whether a row is drawn from as the text before it has it."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return bool(
            self.min_tokens or self.bad_words or self.allowed_token_ids is not None or penalties != (0, 0, 1)
        )

    def ends(self, token: int, eos: frozenset[int]) -> bool:
        """Whether `token`, written by a model whose end-of-sequence ids are `eos`, ends the text."""
        return token in self.stop_token_ids or self.is_eos(token, eos)

    def is_eos(self, token: int, eos: frozenset[int]) -> bool:
        """Whether `token` is one of `eos`, and those count."""
        return token in eos and not self.ignore_eos


@dataclass(frozen=True)
class Role:
    """A model under its prompt; `logits(ids)` is the row [vocab] fp32 that follows the last of `ids`, which
    are at most `max_len`: its context.  The last `earlier` tokens of its prompt are output of an open text.
    """

    logits: Callable[[list[int]], Tensor]
    prompt: list[int]
    eos: frozenset[int] = frozenset()
    max_len: int = sys.maxsize
    earlier: int = 0

    def draw(self, written: list[int], params: Params) -> int:
        """The token it writes after the prompt and `written`."""
        begin = len(self.prompt) - self.earlier
        tokens = self.prompt + written
        ends = self.eos if len(written) < params.min_tokens else None
        return choose(self.row(written), params, len(written), Past(tokens[:begin], tokens[begin:], ends))

    def row(self, written: list[int]) -> Tensor:
        """The logits [vocab] of the token after the prompt and `written`."""
        return self.logits(self.prompt + written)

    def has_room_for(self, written: list[int]) -> bool:
        """Whether its context holds the prompt and `written`."""
        return len(self.prompt) + len(written) <= self.max_len


class Past(NamedTuple):
    """What stands before a row; `ends` are the model's end-of-sequence ids while the text is too short."""

    prompt: list[int]
    output: list[int]
    ends: frozenset[int] | None = None


NO_PAST = Past([], [])


class Written(NamedTuple):
    """What a policy wrote: ids and their authors ("base", "guide"), and "stop" or "length".

    A text of max_tokens tokens ends with "length": nothing is asked about the position after it.
    """

    token_ids: list[int]
    authors: list[str]
    finish_reason: str


def cut_at_stop(
    text: str, stops: Sequence[str], begin: int = 0, keeps_stop: bool = False
) -> tuple[str, bool]:
    """The text as a reader would cut it who sees one character after another and overlooks stop strings that
    end with its first `begin` ones.
    """
    for end in range(begin + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if keeps_stop else end - max(map(len, found))], True
    return text, False


def end_at_stop(
    written: Written, stops: Sequence[str], text_of: Callable[[list[int]], str], begin: int = 0
) -> Written:
    """What is left of `written` where stop strings end it: the token that completes one is its last."""
    ids, authors, _ = written
    for n in range(1, len(ids) + 1):
        if cut_at_stop(text_of(ids[:n]), stops, begin)[1]:
            return Written(ids[:n], authors[:n], "stop")
    return written


@singledispatch
def choose(row: Tensor, params: Params, position: int, past: Past = NO_PAST) -> int:
    """The token drawn at output position `position` from logits [vocab]; other kinds of rows register."""
    p = params
    return pick(changed(row, p, past), p.temperature, p.top_k, p.top_p, p.min_p, p.seed, position)


def changed(row: Tensor, params: Params, past: Past) -> Tensor:
    """The logits [vocab] that are drawn from, one token after the other."""
    # In fp32, on the host: numpy rounds as torch does, and reaches single numbers sooner.
    new, vocab = row.float().cpu().numpy().copy(), len(row)
    banned = [word[-1] for word in params.bad_words if ends_with(past.output, list(word[:-1]))]
    if past.ends is not None:
        banned += [*params.stop_token_ids, *(() if params.ignore_eos else past.ends)]
    allowed = params.allowed_token_ids
    banned += [token for token in range(vocab) if allowed is not None and token not in allowed]
    new[[token for token in banned if token < vocab]] = -math.inf
    for token, bias in params.logit_bias.items():
        new[token] += np.float32(bias)
    if not params.changes_rows:
        return torch.from_numpy(new)
    for token in {*past.prompt, *past.output}:
        if token < vocab:
            x, penalty = new[token], np.float32(params.repetition_penalty)
            new[token] = x / penalty if x > 0 else x * penalty
    for token in set(past.output):
        penalty = params.frequency_penalty * past.output.count(token) + params.presence_penalty
        new[token] -= np.float32(penalty)
    return torch.from_numpy(new)


def ends_with(ids: list[int], end: list[int]) -> bool:
    """Whether `end` are the last of `ids`."""
    return len(end) <= len(ids) and ids[len(ids) - len(end) :] == end


@singledispatch
def top_prob(row: Tensor) -> float:
    """The top-1 probability at temperature 1, before any bias or filter: m."""
    stats = softmax_stats(row[None])
    return math.exp(float(stats.max) - float(stats.lse))


@dataclass(frozen=True)
class Gate:
    """Where the guide is asked: m < threshold, or m <= threshold where the comparator is "<="."""

    threshold: float = 0.4
    comparator: str = "<"

    def is_unsure(self, prob: float) -> bool:
        """Whether a base with top-1 probability `prob` leaves the position to the guide."""
        return prob <= self.threshold if self.comparator == "<=" else prob < self.threshold


def base(role: Role, params: Params) -> Written:
    """The base alone."""
    return _alone(role, params, "base")


def guide(role: Role, params: Params) -> Written:
    """The guide alone."""
    return _alone(role, params, "guide")


def _alone(role: Role, params: Params, author: str) -> Written:
    ids: list[int] = []
    while len(ids) < params.max_tokens:
        token = role.draw(ids, params)
        if params.is_eos(token, role.eos):
            return Written(ids, [author] * len(ids), "stop")
        if token in params.stop_token_ids:
            ids += [token] * params.keeps_stop
            return Written(ids, [author] * len(ids), "stop")
        ids.append(token)
    return Written(ids, [author] * len(ids), "length")


def nudging_token(base: Role, guide: Role, params: Params, gate: Gate) -> Written:
    """At each position the guide writes where the base is unsure, else the base; the owner's EOS ends."""
    ids: list[int] = []
    authors: list[str] = []
    while len(ids) < params.max_tokens:
        unsure = gate.is_unsure(top_prob(base.row(ids)))
        owner = guide if unsure else base
        token = owner.draw(ids, params)
        if params.is_eos(token, owner.eos):
            return Written(ids, authors, "stop")
        if token in params.stop_token_ids and not params.keeps_stop:
            return Written(ids, authors, "stop")
        ids.append(token)
        authors.append("guide" if unsure else "base")
        if token in params.stop_token_ids:
            return Written(ids, authors, "stop")
    return Written(ids, authors, "length")


def nudging_word(
    base: Role,
    guide: Role,
    params: Params,
    gate: Gate,
    starts_with_space: Callable[[int], bool],
    lookahead: int = LOOKAHEAD,
) -> Written:
    """At each decision point the base writes a token where it is sure, else the guide writes a word.

    starts_with_space(id): whether the token's own text begins with U+0020.  The look-ahead is not shortened
    near max_tokens: what the guide would write past it still decides where its words and the text end.  It
    ends where the guide's context is full.
    """
    ids: list[int] = []
    authors: list[str] = []
    while len(ids) < params.max_tokens:
        row = base.row(ids)
        unsure = gate.is_unsure(top_prob(row))
        if unsure:
            new, ended = _next_word(guide, ids, params, starts_with_space, lookahead)
        else:
            new = [base.draw(ids, params)]
            ended = params.is_eos(new[0], base.eos)
            new = [] if ended else new
        for token in new[: params.max_tokens - len(ids)]:
            if token in params.stop_token_ids and not params.keeps_stop:
                return Written(ids, authors, "stop")
            ids.append(token)
            authors.append("guide" if unsure else "base")
            if token in params.stop_token_ids:
                return Written(ids, authors, "stop")
        if ended and len(ids) < params.max_tokens:
            return Written(ids, authors, "stop")
    return Written(ids, authors, "length")


def _next_word(
    guide: Role, ids: list[int], params: Params, starts_with_space: Callable[[int], bool], lookahead: int
) -> tuple[list[int], bool]:
    """The guide's next word after `ids`, or all that is left of its text and True if that ends in sight."""
    draft: list[int] = []
    while len(draft) < lookahead and guide.has_room_for(ids + draft):
        token = guide.draw(ids + draft, params)
        if params.is_eos(token, guide.eos):
            return draft, True
        draft.append(token)
    starts = (j for j in range(1, len(draft)) if starts_with_space(draft[j]))
    return draft[: next(starts, len(draft))], False


class Completion(NamedTuple):
    """A completion server's answer: its text, and per token the text and the top-1 probability.

    The token that ends it ("stop") is listed, with the text "".
    """

    text: str
    tokens: list[str]
    probs: list[float]
    finish: str  # "stop" | "length"


class WrittenText(NamedTuple):
    """What the text-level policy wrote: the text, its maximal runs (author, text), "stop" or "length"."""

    text: str
    segments: list[tuple[str, str]]
    finish_reason: str


class ContextFull(Exception):
    """A model was asked about more tokens than it can read."""


Complete = Callable[[str, int], Completion]  # (prompt and text so far, max_tokens)


def text_client(
    logits: Callable[[list[int]], Tensor],
    encode: Callable[[str], list[int]],
    token_bytes: Callable[[int], bytes],
    eos: frozenset[int],
    prompt: str,
    params: Params,
    max_len: int = sys.maxsize,
) -> Complete:
    """A model as a completion server: every call encodes the whole text again.  Where its context of
    `max_len` tokens is full a completion ends with "length"; raises ContextFull where it cannot begin.

    Noise is keyed by the number of tokens before the new one, less those of `prompt`.  A token's text is its
    bytes decoded alone, U+FFFD standing in for halves of characters; the completion's is decoded as a whole.
    """

    def complete(text: str, max_tokens: int) -> Completion:
        ids, prompt_len = encode(text), len(encode(prompt))
        if len(ids) > max_len:
            raise ContextFull
        pieces: list[bytes] = []
        probs: list[float] = []
        finish = "length"
        while len(pieces) < max_tokens and finish == "length" and len(ids) <= max_len:
            row = logits(ids)
            before = max(0, len(ids) - prompt_len)
            past = Past(ids[:prompt_len], ids[prompt_len:], eos if before < params.min_tokens else None)
            token = choose(row, params, before, past)
            finish = "stop" if params.ends(token, eos) else "length"
            pieces.append(b"" if finish == "stop" else token_bytes(token))
            probs.append(top_prob(row))
            ids = [*ids, token]
        tokens = [piece.decode("utf-8", "replace") for piece in pieces]
        return Completion(b"".join(pieces).decode("utf-8", "replace"), tokens, probs, finish)

    return complete


def nudging_reference(
    base: Complete,
    guide: Complete,
    base_prompt: str,
    guide_prompt: str,
    gate: Gate,
    count_tokens: Callable[[str], int],
    max_tokens: int = 256,
) -> WrittenText:
    """The authors' released client, on texts, with its heuristics.

    Two deviations: `count_tokens` is the base's tokenizer (without special tokens), theirs is tiktoken's; and
    token texts are as in `text_client`, theirs as their server has them.  As with them `max_tokens` is where
    no new round begins, not a cut, and the base's end of text hands the text back to the guide.
    """
    pieces: list[tuple[str, str]] = []
    last, repeats, finish = "", 0, "length"
    for _ in range(MAX_ROUNDS):
        text = "".join(piece for _, piece in pieces)
        if count_tokens(text) >= max_tokens:
            break
        proposal = guide(guide_prompt + text, LOOKAHEAD)
        if proposal.finish == "stop":
            pieces.append(("guide", proposal.text))
            finish = "stop"
            break
        nudge, takeover = _nudging_words(proposal.text, base, base_prompt + text, gate)
        repeats = repeats + 1 if nudge == last else 0
        last = nudge
        if repeats == 3:
            finish = "stop"
            break
        pieces.append(("guide", nudge))
        if takeover is not None and takeover.text:
            run = _base_run(takeover, base, base_prompt, text + nudge, gate, count_tokens, max_tokens)
            pieces.append(("base", run))
    return _cleaned(pieces, finish)


def _nudging_words(proposal: str, base: Complete, before: str, gate: Gate) -> tuple[str, Completion | None]:
    """The words of `proposal` that are written, and the base's completion behind them where it takes over.

    The first word is always written and the last, perhaps cut, never, unless it is the only one.  The base
    takes over before a word that begins with its own first token (agreement), or where it is sure.
    """
    stripped = proposal.lstrip(" ")
    spaces, words = proposal[: len(proposal) - len(stripped)], stripped.split(" ")
    if len(words) == 1:
        return proposal, None
    for j, word in enumerate(words):
        if j == 0 or word == "":
            continue
        nudge = spaces + " ".join(words[:j])
        completion = base(before + nudge, LOOKAHEAD)
        if (" " + word).startswith(completion.tokens[0]) or not gate.is_unsure(completion.probs[0]):
            return nudge, completion
    return spaces + " ".join(words[:-1]), None


def _base_run(
    takeover: Completion,
    base: Complete,
    prompt: str,
    written: str,
    gate: Gate,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> str:
    """What the base writes behind `written`: the first token unasked, then as long as it is sure."""
    run = takeover.tokens[0]
    budget = max_tokens - count_tokens(written)
    # Their client never looks whether this first completion stopped: it would ask once more.
    chunk: Completion | None = Completion(
        "".join(takeover.tokens[1:]), takeover.tokens[1:], takeover.probs[1:], "length"
    )
    while count_tokens(run) < budget:
        chunk = chunk or base(prompt + written + run, LOOKAHEAD)
        if chunk.text in run:  # also where there is no text
            break
        sure = next((i for i, p in enumerate(chunk.probs) if gate.is_unsure(p)), len(chunk.tokens))
        new = "".join(chunk.tokens[:sure])
        if len(new.split(" ")) > 5 and new in written + run:
            break
        run += new
        if sure < len(chunk.tokens) or chunk.finish == "stop":
            break
        chunk = None
    return run


def _cleaned(pieces: list[tuple[str, str]], finish: str) -> WrittenText:
    """The text of `pieces`, stripped and without repeated endings, and the runs it consists of."""
    whole = "".join(piece for _, piece in pieces)
    text = whole.strip()
    while size := _repeated_suffix(text):
        text = text[:-size]
    begin = len(whole) - len(whole.lstrip())
    segments: list[tuple[str, str]] = []
    at = 0
    for author, piece in pieces:
        kept = piece[max(0, begin - at) : max(0, begin + len(text) - at)]
        at += len(piece)
        if kept and segments and segments[-1][0] == author:
            segments[-1] = (author, segments[-1][1] + kept)
        elif kept:
            segments.append((author, kept))
    return WrittenText(text, segments, finish)


def _repeated_suffix(text: str) -> int:
    """The length, at least 30, of an ending that stands twice in a row, 0 for none.

    Found as their client finds it, by bisection, although the lengths that repeat need not be an interval.
    """
    low, high, found = 0, len(text), 0
    while low <= high:
        size = (low + high) // 2
        if size >= 30 and text[:-size].endswith(text[-size:]):
            low, found = size + 1, size
        else:
            high = size - 1
    return found
