"""Greedy nudging over transformers' models, question by question, straight from the definition.

Many questions advance in lockstep, one token each per step, only so that 500 of them take seconds; no row
looks at another.  A row's next token is the guide's while a word of the guide's is being written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

LOOKAHEAD = 16


@dataclass
class Text:
    """What was written: `authors` says "base" or "guide" per token."""

    tokens: list[int] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)
    word: list[int] = field(default_factory=list)  # the guide's tokens still to be written
    ends_after_word: bool = False
    is_finished: bool = False

    def write(self, token: int, author: str) -> None:
        self.tokens.append(token)
        self.authors.append(author)


def padded(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Rows of ids, padded on the left: `input_ids` and `attention_mask` [rows, longest]."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: list[list[int]], max_tokens: int, eos: int) -> list[list[int]]:
    """One model's own text for every prompt, without its end-of-sequence token."""
    inputs = padded(prompts, eos)
    written = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=eos
    )
    rows = written[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def first_word(draft: list[int], opens_word: list[bool]) -> list[int]:
    """The tokens of `draft` up to the first after its first that begins with a space."""
    ends = (j for j in range(1, len(draft)) if opens_word[draft[j]])
    return draft[: next(ends, len(draft))]


class Lockstep:
    """A model that reads one further token of every row per call."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], pad: int) -> None:
        inputs = padded(prompts, pad)
        self._model, self._mask, self._cache = model, inputs["attention_mask"], DynamicCache()
        self.logits = self._read(inputs["input_ids"], self._mask.cumsum(1).sub(1).clamp(min=0))

    def advance(self, tokens: list[int]) -> None:
        self._mask = torch.cat((self._mask, torch.ones(len(tokens), 1, dtype=self._mask.dtype)), dim=1)
        self.logits = self._read(torch.tensor(tokens)[:, None], self._mask.sum(1, keepdim=True) - 1)

    @torch.no_grad()
    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def nudge(
    base: PreTrainedModel,
    guide: PreTrainedModel,
    base_prompts: list[list[int]],
    guide_prompts: list[list[int]],
    *,
    threshold: float,
    max_tokens: int,
    eos: int,
    opens_word: list[bool],
) -> list[Text]:
    """Nudged texts at word granularity; `opens_word[id]` says whether a token's text begins with a space."""
    texts = [Text() for _ in base_prompts]
    reader = Lockstep(base, base_prompts, eos)
    for _ in range(max_tokens):
        top, best = reader.logits.softmax(-1).max(-1)
        deciding = [row for row, text in enumerate(texts) if not text.is_finished and not text.word]
        unsure = [row for row in deciding if top[row].item() < threshold and not texts[row].ends_after_word]
        if unsure:
            drafts = greedy(guide, [guide_prompts[row] + texts[row].tokens for row in unsure], LOOKAHEAD, eos)
            for row, draft in zip(unsure, drafts, strict=True):
                # A short draft was cut by the guide's end of text: all of it is written, then the text ends.
                texts[row].ends_after_word = len(draft) < LOOKAHEAD
                texts[row].word = draft if texts[row].ends_after_word else first_word(draft, opens_word)
        for row, text in enumerate(texts):
            if text.is_finished:
                continue
            if text.word:
                text.write(text.word.pop(0), "guide")
            elif text.ends_after_word or best[row].item() == eos:
                text.is_finished = True
            else:
                text.write(int(best[row].item()), "base")
        if all(text.is_finished for text in texts):
            break
        reader.advance([text.tokens[-1] if text.tokens else eos for text in texts])
    return texts
