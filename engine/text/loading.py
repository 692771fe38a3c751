"""Which tokenizer a checkpoint directory has."""

from __future__ import annotations

from pathlib import Path

from nudging.text.tokenizer import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory: tokenizer.json, else tokenizer.model; None with neither.

    CheckpointError: a file is damaged or needs what this engine does not do.
    """
    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        from nudging.text.tokenizer_json import JsonTokenizer

        return JsonTokenizer.load(folder)
    if (folder / "tokenizer.model").is_file():
        from nudging.text.tokenizer_sp import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder)
    return None
