"""The pocket family: five small trained checkpoints, and the questions that grade them."""

from __future__ import annotations

from pathlib import Path

from nudging.errors import BadRequest

CARDS = {
    "base": "2.8M parameters, plain prose only: knows the pocket world, is unsure how to begin an answer",
    "base-aligned": "the base tuned on 500 steps of dialogues: what nudging is compared with",
    "guide": "0.5M parameters, prose then dialogues about people nobody knows: has the form, not the facts",
    "guide-base": "the guide before its dialogues",
    "guide-sp": "as guide, with a SentencePiece tokenizer of its own",
}


def path(name: str) -> Path:
    """The checkpoint directory of one of the family; any other name raises `BadRequest`."""
    if name not in CARDS:
        raise BadRequest(f"no pocket model is called {name!r}; there are {', '.join(CARDS)}")
    return Path(__file__).parent / name
