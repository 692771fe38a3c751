"""Texts to try text handling on: real ones where they are there, and awkward ones of every kind."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ODD = [
    "",
    " ",
    "  two spaces,  twice\n\n\tand a tab ",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \u212b is not \u00c5",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002 \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600\U0001f3fd\u200d\U0001f468 \U0001f1eb\U0001f1f7 e\u0301\u0327\u0323",
    "\x00\x01\x1f\x7f\x85\u2028\ufeff\ufffd",
    "\u2581 is how \u2581sentencepiece\u2581 writes a space",
    "[INST] hi <|endoftext|> <|im_end|>||| PHONE|||PHONE_NUMBER|||",
    "<0x41> is a piece, 'A' is a letter",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from([*ODD, "the ", " The", "\u0301", "\u2581", "  ", "<0x0A>"]), max_size=4
).map("".join)


def gsm8k(lines: int) -> list[str]:
    with (DATA / "gsm8k_train_256.jsonl").open(encoding="utf-8") as file:
        return [
            text for _, line in zip(range(lines), file, strict=False) for text in json.loads(line).values()
        ]
