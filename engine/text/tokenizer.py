"""Text to token ids and back.  What a token adds to a text is a fixed byte string: all else rests on that.

Three kinds of text, told apart on purpose:
- `encode` reads a whole text as the model was trained to, special tokens and dummy prefix space included;
- `encode_continuation` reads text that follows other text: the tokens' bytes are exactly the text's bytes;
- `text_of` is running text, the joined bytes of the tokens; `decode` undoes `encode` (no dummy space).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from weakref import WeakKeyDictionary

from nudging.errors import BadRequest
from nudging.text.special_tokens import MAX_VOCAB


class Tokenizer(ABC):
    """A vocabulary with its exact bytes; the two back-ends add only how text is cut into tokens."""

    def __init__(
        self,
        table: Sequence[bytes],
        special: Iterable[int],
        *,
        bos_id: int | None,
        eos_id: int | None,
        drops_first_space: bool,
        rules: tuple[str, str],
        special_texts: Mapping[int, str] | None = None,
    ) -> None:
        """`table[id]` holds the bytes of each token, empty for special ones and for ids that no token has.

        `drops_first_space`: a whole text is encoded with one space in front, which `decode` takes away again.
        `rules`: (kind, digest) of what orders the merges; digests of unlike kinds are not comparable.
        `special_texts`: how special tokens are written where somebody wants to see them.
        """
        self._table = tuple(table)
        self._special = frozenset(special)
        self._drops_first_space = drops_first_space
        self._rules = rules
        self._special_texts = special_texts or {}
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._num_rows = MAX_VOCAB

    def serve(self, num_rows: int) -> list[int]:
        """Read texts for a model whose embedding has `num_rows` rows; the ids of tokens beyond them."""
        self._num_rows = num_rows
        ids = range(num_rows, self.vocab_size)
        return [token for token in ids if self._table[token] or token in self._special]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that a token has; an embedding may be padded beyond it."""
        return len(self._table)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a whole text.  `special` adds what the tokenizer itself adds (say, a leading BOS).

        Special tokens written out in the text are recognised either way.  BadRequest: lone surrogates, and a
        token that the model's embedding lacks.
        """
        utf8(text)
        ids = self._encode(text, special)
        if max(ids, default=0) >= self._num_rows:
            beyond = next(token for token in ids if token >= self._num_rows)
            raise BadRequest(
                f"the text has the token {self.shown(beyond)!r}, whose id is {beyond}, and the model's "
                f"embedding has {self._num_rows} rows, ids 0 to {self._num_rows - 1}; take it out of the "
                "text, or give a checkpoint whose embedding has it"
            )
        return ids

    @abstractmethod
    def _encode(self, text: str, special: bool) -> list[int]:
        """`encode`, whatever ids the model has."""

    @abstractmethod
    def _cut(self, text: str) -> list[int]:
        """The ids of `text`, no special tokens, no dummy prefix; the bytes may differ in odd characters."""

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that follows other text: `bytes_of(ids)` is exactly the text in UTF-8.

        What looks like a special token is plain text here, and so is a token that the model's embedding
        lacks.  BadRequest: a character without tokens.
        """
        return self._cut_exactly(text, utf8(text))

    def _cut_exactly(self, text: str, data: bytes) -> list[int]:
        ids = self._cut(text)
        if self.bytes_of(ids) == data and max(ids, default=0) < self._num_rows:
            return ids
        # Some character has no token of its own or reads as another (U+2581 is sentencepiece's space): halve
        # the text until it stands alone, and spell it in bytes.
        if len(text) > 1:
            left, right = text[: len(text) // 2], text[len(text) // 2 :]
            return self._cut_exactly(left, left.encode()) + self._cut_exactly(right, right.encode())
        missing = [byte for byte in data if byte not in self._byte_ids]
        if missing:
            raise BadRequest(
                f"the tokenizer has no token for {text!r} (U+{ord(text):04X}) and none for its bytes; "
                "remove the character or use a tokenizer with byte fallback"
            )
        return [self._byte_ids[byte] for byte in data]

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The lowest id that stands for a byte alone, of each byte that has one."""
        ids = range(min(self.vocab_size, self._num_rows) - 1, -1, -1)
        return {self._table[token][0]: token for token in ids if len(self._table[token]) == 1}

    def token_bytes(self, token: int) -> bytes:
        """The bytes `token` adds to a running text: none if special or an embedding's padding row."""
        return self._table[token] if 0 <= token < len(self._table) else b""

    def shown_bytes(self, token: int) -> bytes:
        """Like `token_bytes`, special tokens written out."""
        return self._special_texts.get(token, "").encode("utf-8") or self.token_bytes(token)

    def shown(self, token: int) -> str:
        """The token for messages, special tokens written out."""
        return self.shown_bytes(token).decode("utf-8", "replace")

    def spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The ids of `word` as a text goes on with it, as it stands and behind a space."""
        variants = dict.fromkeys((word, " " + word.lstrip()))
        return tuple(dict.fromkeys(tuple(self.encode_continuation(text)) for text in variants))

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes of a running text."""
        return b"".join(map(self.token_bytes, ids))

    def text_of(self, ids: Iterable[int]) -> str:
        """The running text: invalid UTF-8 reads as U+FFFD, a leading space stays."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `encode` reads as `ids`, special tokens skipped.  BadRequest: an unknown id."""
        self.check(ids)
        text = self.text_of(ids)
        return text[1:] if self._drops_first_space and text.startswith(" ") else text

    def check(self, ids: Iterable[int]) -> None:
        """BadRequest where an id is not of this vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise BadRequest(
                    f"token id {token} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}; "
                    "use ids of this model's own tokenizer"
                )

    def starts_with_space(self, token: int) -> bool:
        """Whether the token's own text begins with U+0020: where the word granularity sees a new word."""
        return self.token_bytes(token)[:1] == b" "

    def is_special(self, token: int) -> bool:
        """Whether the token steers the model (BOS, EOS, turn marks ...) and is no part of any text."""
        return token in self._special

    def same_as(self, other: Tokenizer) -> bool:
        """Whether ids may pass between the two models untouched: every id has the same bytes in both.

        Padding rows and special tokens have no bytes.  So a checkpoint with a larger embedding, or with more
        special tokens (an instruct variant), has the same tokenizer; one with more tokens of text has not.
        """
        return self.difference(other) is None

    def difference(self, other: Tokenizer) -> str | None:
        """What keeps ids from passing between the two (see `same_as`), in words; None where nothing does.

        Every request asks; the tables, a hundred thousand tokens long, are compared once.
        """
        if other not in self._differences:
            self._differences[other] = self._find_difference(other)
        return self._differences[other]

    def _find_difference(self, other: Tokenizer) -> str | None:
        mine, theirs = self._written, other._written
        if mine != theirs:
            pairs = enumerate(zip_longest(mine, theirs, fillvalue=b""))
            token = next(i for i, (a, b) in pairs if a != b)
            shown, another = self.shown(token) or "no text", other.shown(token) or "no text"
            return f"id {token} is {shown!r} in the one and {another!r} in the other"
        if self._rules[0] == other._rules[0] and self._rules != other._rules:
            return f"their {len(mine)} tokens are the same and the {self._rules[0]} that order them are not"
        return None

    @cached_property
    def _differences(self) -> WeakKeyDictionary[Tokenizer, str | None]:
        """From the tokenizers that this one was compared with."""
        return WeakKeyDictionary()

    @cached_property
    def _written(self) -> tuple[bytes, ...]:
        """The table up to the last token that has bytes."""
        end = len(self._table)
        while end and not self._table[end - 1]:
            end -= 1
        return self._table[:end]


def utf8(text: str) -> bytes:
    """The text in UTF-8.  BadRequest: a lone surrogate, which is no character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "which no UTF-8 text can hold; remove it"
        ) from error
