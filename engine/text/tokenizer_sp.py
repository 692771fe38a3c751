"""tokenizer.model, cut by `sentencepiece`, with the added tokens that the files beside it list."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import sentencepiece

from nudging.errors import CheckpointError
from nudging.files.lfs import refuse_pointer
from nudging.text.special_tokens import AddedToken, declared_tokens, named_special_tokens, read_json
from nudging.text.tokenizer import Tokenizer

_SPACE = "\u2581"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")

# A protobuf message followed by a second one reads as the two merged, so these bytes change three fields
# of the model's normalizer_spec (field 3): no character map (2), no dummy prefix (3), extra spaces stay (4).
_VERBATIM = b"\x1a\x06" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.  As in sentencepiece, a text is read as if a space stood before it."""

    @classmethod
    def load(cls, folder: Path) -> SentencePieceTokenizer:
        file = folder / "tokenizer.model"
        proto = file.read_bytes()
        whole, verbatim = _processor(proto, file), _processor(proto + _VERBATIM, file)
        return cls(whole, verbatim, _added_tokens(whole, folder), folder)

    def __init__(
        self,
        whole: sentencepiece.SentencePieceProcessor,
        verbatim: sentencepiece.SentencePieceProcessor,
        added: dict[int, AddedToken],
        folder: Path,
    ) -> None:
        config, named = read_json(folder / "tokenizer_config.json"), named_special_tokens(folder)
        size = max([whole.get_piece_size(), *(token + 1 for token in added)])
        table = [_piece_bytes(whole, token) for token in range(whole.get_piece_size())]
        table += [b""] * (size - len(table))
        special = {token for token in range(whole.get_piece_size()) if _has_no_text(whole, token)}
        for token, item in added.items():
            if item.special:
                special.add(token)
            table[token] = b"" if item.special else item.text.encode("utf-8")
        ids = {item.text: token for token, item in added.items()}
        scores = [whole.get_score(token).hex() for token in range(whole.get_piece_size())]
        super().__init__(
            table,
            special,
            bos_id=_named_id(named.get("bos_token"), ids, whole.bos_id()),
            eos_id=_named_id(named.get("eos_token"), ids, whole.eos_id()),
            drops_first_space=whole.normalize("a").startswith(_SPACE),
            rules=("pieces", hashlib.sha256("\n".join(scores).encode()).hexdigest()),
            special_texts={token: item.text for token, item in added.items() if item.special},
        )
        self._whole, self._verbatim = whole, verbatim
        self._prefixes_every_part = config.get("legacy") is True
        splits = config.get("split_special_tokens")
        found = {token: item for token, item in added.items() if not (splits and item.special)}
        self._pattern, self._group_ids = _pattern(found)
        # Llama's rule where the configuration is silent: BOS in front, nothing behind.
        self._front = [self.bos_id] if config.get("add_bos_token", True) and self.bos_id is not None else []
        self._back = [self.eos_id] if config.get("add_eos_token", False) and self.eos_id is not None else []

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_part(text[start : match.start()], first=start == 0)
            assert match.lastindex is not None, f"{match} matched no alternative"
            ids.append(self._group_ids[match.lastindex - 1])
            start = match.end()
        ids += self._encode_part(text[start:], first=start == 0)
        return [*self._front, *ids, *self._back] if special else ids

    def _encode_part(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        cutter = self._whole if first or self._prefixes_every_part else self._verbatim
        return list(cutter.encode(text))

    def _cut(self, text: str) -> list[int]:
        return list(self._verbatim.encode(text))


def _processor(proto: bytes, file: Path) -> sentencepiece.SentencePieceProcessor:
    refuse_pointer(proto[:64], file)
    if _TIKTOKEN.match(proto):
        raise CheckpointError(
            f"{file} is a tiktoken vocabulary, which this engine does not read; put the model's "
            "tokenizer.json beside it, which its repository has or transformers' save_pretrained writes"
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError(f"{file} is not a sentencepiece model ({error}); fetch it again") from error


def _has_no_text(model: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    return bool(model.is_control(token) or model.is_unknown(token))


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    if _has_no_text(model, token):
        return b""
    piece: str = model.id_to_piece(token)
    if model.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8")


def _named_id(text: object, ids: dict[str, int], default: int) -> int | None:
    """The id of a special token by its text, else the model's own, which is negative where it has none."""
    if isinstance(text, str) and text in ids:
        return ids[text]
    return default if default >= 0 else None


def _added_tokens(model: sentencepiece.SentencePieceProcessor, folder: Path) -> dict[int, AddedToken]:
    """The model's own control tokens and those that the files beside it list, by id."""
    pieces = {model.id_to_piece(token): token for token in range(model.get_piece_size())}
    found = {
        token: AddedToken(piece, special=True)
        for piece, token in pieces.items()
        if _has_no_text(model, token)
    }
    for item in declared_tokens(folder):
        # One that no file gives an id is a piece, or comes behind all others, as in transformers.
        last = max([len(pieces) - 1, *found])
        found[pieces.get(item.text, last + 1) if item.id is None else item.id] = item
    return found


def _pattern(added: Mapping[int, AddedToken]) -> tuple[re.Pattern[str], list[int]]:
    """One group per added token, and their ids in that order; where several match, the longest does."""
    ids = sorted(added, key=lambda token: -len(added[token].text))
    return re.compile("|".join(_alternative(added[token]) for token in ids) or r"(?!)"), ids


def _alternative(item: AddedToken) -> str:
    text = f"({re.escape(item.text)})"
    if item.single_word:
        text = rf"(?<!\w){text}(?!\w)"
    return (r"\s*" if item.lstrip else "") + text + (r"\s*" if item.rstrip else "")
