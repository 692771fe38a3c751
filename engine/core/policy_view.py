"""A request as its policy sees it: rows on demand, and the gaps between them as needs."""

from __future__ import annotations

from typing import Any

from nudging.checks import is_int
from nudging.core.executor import Sampler
from nudging.core.fast_path_rules import NO_ENDS, ends_of
from nudging.core.need import Need
from nudging.core.past import past_of
from nudging.core.request import Request
from nudging.core.rows import Row
from nudging.core.sequence import Sequence
from nudging.core.speculation.ledger import Ledger
from nudging.errors import BadRequest, NumericalError
from nudging.policies.protocol import Completion
from nudging.text.tokenizer import Tokenizer


class MissingRow(BaseException):
    """A policy asked for a row that is not computed yet; the engine computes it and runs the step again.

    Like GeneratorExit it is no error: a policy that handles its own exceptions must not catch it.
    """

    def __init__(self, need: Need) -> None:
        super().__init__(need)
        self.need = need

    def __str__(self) -> str:
        return f"{self.need.role} has not answered at {self.need.first} yet"


class RequestView:
    """The view of one request; see `nudging.policies.protocol.View`."""

    def __init__(self, request: Request, ledger: Ledger, sampler: Sampler) -> None:
        self.request = request
        self._sampler = sampler
        self._ledger = ledger
        self._contexts: dict[str, tuple[str, int]] = {}
        self._drafting = False
        self._smallest_vocab = min(request.roles[role].vocab_size for role in request.facts.roles)

    @property
    def max_tokens(self) -> int:
        return self.request.max_tokens - len(self.request.output)

    def vocab_size(self, role: str) -> int:
        """The ids a row speaks of: those all roles know, where embeddings are padded to unlike sizes."""
        if self.request.facts.shares_ids:
            return self._smallest_vocab
        return self.request.roles[role].vocab_size

    def row(self, role: str) -> Row:
        sequence, position = self._context(role)
        return self._row(sequence, role, position)

    def rollout(self, role: str, length: int) -> list[Row]:
        sequence, position = self._context(role)
        return self._continue(role, sequence, position, length, self._eos(role))

    def draft(self, role: str, length: int) -> list[Row]:
        """Like `rollout`, on the engine's own account: rows that no policy has asked for.  It ends before one
        that is not finite.
        """
        self._drafting = True
        try:
            return self.rollout(role, length)
        finally:
            self._drafting = False

    def known_path(self, role: str) -> tuple[int, int]:
        """How many tokens of `role`'s own path behind the text are known, and how many it has to read for
        one more.
        """
        sequence, position = self._context(role)
        at = position
        while isinstance(row := sequence.rows.get(at), Row):
            at += 1
            if sequence.tokens[at - 1 : at] != [row.token]:
                break
        return at - position, max(at - sequence.num_computed, 1)

    def is_eos(self, role: str, token: int) -> bool:
        return token in self._eos(role)

    def starts_with_space(self, token: int) -> bool:
        tokenizer = self.request.tokenizer
        if tokenizer is None:
            raise BadRequest("words need a tokenizer and this checkpoint has none; use granularity='token'")
        return tokenizer.starts_with_space(token)

    def pick(self, logits: Any) -> int:
        request = self.request
        role, roles = request.facts.roles[0], request.facts.roles
        past = past_of(request, role, request.prompts[role].ids + request.output, roles)
        position = request.first_position + len(request.output)
        vocab = self.vocab_size(role)
        return self._sampler.pick(logits, vocab, request.params, request.seed, position, past)

    def complete(self, role: str, text: str, length: int) -> Completion:
        sequence, position = self._text_context(role, text)
        ends = self._eos(role) | frozenset(self.request.params.stop_token_ids)
        rows = self._continue(role, sequence, position, length, ends)
        if not rows:
            return Completion((), (), "", "length")
        stopped = rows[-1].token in ends
        pieces = [self._tokenizer(role).token_bytes(row.token) for row in rows]
        if stopped:
            pieces[-1] = b""
        return Completion(
            tuple(piece.decode("utf-8", "replace") for piece in pieces),
            tuple(row.top_prob for row in rows),
            b"".join(pieces).decode("utf-8", "replace"),
            "stop" if stopped else "length",
        )

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer("base").encode_continuation(text))

    def _tokenizer(self, role: str) -> Tokenizer:
        tokenizer = self.request.roles[role].tokenizer
        if tokenizer is None:
            raise BadRequest(
                f"this policy works on text and {role!r} has no tokenizer; use granularity='token'"
            )
        return tokenizer

    def _context(self, role: str) -> tuple[Sequence, int]:
        """The role's sequence, made to begin with prompt + output, and the position after it."""
        sequence = self._sequence(role)
        output = self.request.output
        written = sequence.context_len - sequence.prompt_len
        self._ledger.rewind(role, sequence.set_context(sequence.context_len, output[written:]))
        sequence.context_len = sequence.prompt_len + len(output)
        return sequence, sequence.context_len

    def _sequence(self, role: str) -> Sequence:
        sequence = self.request.sequences.get(role)
        if sequence is None:
            known = ", ".join(map(repr, self.request.facts.roles))
            raise BadRequest(f"a policy asks {role!r}, which is none of its roles; those are {known}")
        return sequence

    def _text_context(self, role: str, text: str) -> tuple[Sequence, int]:
        """The role's sequence, made to begin with prompt + text tokenised together, and the position
        after it.
        """
        sequence = self._sequence(role)
        known = self._contexts.get(role)
        if known is not None and known[0] == text:
            return sequence, known[1]
        tokenizer = self._tokenizer(role)
        prompt = self.request.prompts[role]
        if prompt.text is not None:
            ids = tokenizer.encode(prompt.text + text, special=prompt.special)
        else:
            ids = prompt.ids + tokenizer.encode_continuation(text)
        sequence.set_context(0, ids)
        sequence.forget_rows_before(len(ids))
        self._contexts[role] = (text, len(ids))
        return sequence, len(ids)

    def _row(
        self, sequence: Sequence, role: str, position: int, ahead: int = 0, ends: frozenset[int] = NO_ENDS
    ) -> Row:
        """The row at `position`; where it is missing, so are the `ahead` ones behind it.  Raises its
        NumericalError where it is not finite.
        """
        if not self._drafting:
            self._ledger.ask(role, position)
        row = sequence.want_row(position)
        if row is None:
            raise MissingRow(Need(role, position, position, ahead, ends))
        if isinstance(row, NumericalError):
            raise row
        return row

    def _continue(
        self, role: str, sequence: Sequence, position: int, length: int, ends: frozenset[int]
    ) -> list[Row]:
        """`role`'s own path from `position` on, until an end of sequence, `length` rows or its context
        is full.
        """
        if not is_int(length) or length < 0:
            raise BadRequest(f"a policy asks for {length!r} tokens; that is a whole number from 0 on")
        rows: list[Row] = []
        max_len = self.request.roles[role].max_len
        if position > max_len:
            raise BadRequest(f"the text fills the context of {role!r} ({max_len} tokens); lower max_tokens")
        last = min(position + length, max_len + 1)
        for at in range(position, last):
            if rows:
                self._ledger.rewind(role, sequence.set_context(at - 1, (rows[-1].token,)))
            if self._drafting and isinstance(sequence.rows.get(at), NumericalError):
                break
            rows.append(self._row(sequence, role, at, last - 1 - at, ends))
            if rows[-1].token in ends:
                break
        return rows

    def _eos(self, role: str) -> frozenset[int]:
        return ends_of(self.request, role)
