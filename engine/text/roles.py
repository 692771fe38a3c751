"""The roles of an engine: names for a model, its tokenizer, its chat template and its end-of-sequence ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nudging.text.chat_template import ChatTemplate, load_chat_template
from nudging.text.loading import load_tokenizer
from nudging.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Role:
    """One role of an engine.  `model` names the loaded model, which several roles may share."""

    name: str
    model: str
    tokenizer: Tokenizer | None
    template: ChatTemplate
    eos_ids: frozenset[int]
    vocab_size: int
    max_len: int

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The ids of each word in all its spellings; none without a tokenizer."""
        tokenizer = self.tokenizer
        return () if tokenizer is None else tuple(ids for word in words for ids in tokenizer.spellings(word))


def load_text_side(path: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of a checkpoint directory; either may be missing."""
    return load_tokenizer(path), load_chat_template(path)
