"""tokenizer.json, cut by the `tokenizers` library; the tokens' bytes follow from the decoder it names."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from nudging.errors import CheckpointError
from nudging.text.special_tokens import (
    MAX_VOCAB,
    AddedToken,
    declared_tokens,
    named_special_tokens,
    read_json,
)
from nudging.text.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins of bytes, inverted for str.translate: code point -> the byte as latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {256 + i: chr(byte) for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_ALPHABET = frozenset(map(chr, _BYTE_OF))


@dataclass(frozen=True)
class _Spelling:
    """How the vocabulary writes bytes as strings, read from the decoder's description."""

    byte_level: bool = False
    byte_pieces: bool = False  # <0x0A> is one byte
    replacements: tuple[tuple[str, str], ...] = ()
    drops_first_space: bool = False

    @classmethod
    def of(cls, decoder: dict[str, Any] | None, file: Path) -> _Spelling:
        spelling = cls()
        for part in _flatten(decoder, "decoders"):
            kind = part["type"]
            if kind == "ByteLevel":
                spelling = replace(spelling, byte_level=True)
            elif kind == "ByteFallback":
                spelling = replace(spelling, byte_pieces=True)
            elif kind == "Replace" and "String" in part["pattern"]:
                pair = (part["pattern"]["String"], part["content"])
                spelling = replace(spelling, replacements=(*spelling.replacements, pair))
            elif kind == "Metaspace":
                pair = (part["replacement"], " ")
                prefixed = part.get("prepend_scheme", "always") != "never" and part.get(
                    "add_prefix_space", True
                )
                spelling = replace(
                    spelling, replacements=(*spelling.replacements, pair), drops_first_space=prefixed
                )
            elif kind == "Strip" and part["content"] == " " and part["stop"] == 0:
                spelling = replace(spelling, drops_first_space=part["start"] > 0)
            elif kind != "Fuse":
                raise CheckpointError(f"{file}: {_KNOWN_DECODERS}; this one has {part}")
        if not spelling.byte_level and not spelling.replacements:
            raise CheckpointError(f"{file}: {_KNOWN_DECODERS}; this one has {decoder}")
        return spelling

    def bytes_of(self, token: str, added: bool) -> bytes:
        if self.byte_level:
            # An added token is text as it stands, even where its letters look like the byte alphabet's.
            if added or not _ALPHABET.issuperset(token):
                return token.encode("utf-8")
            return token.translate(_BYTE_OF).encode("latin-1")
        if self.byte_pieces and not added and (match := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token.encode("utf-8")


_KNOWN_DECODERS = (
    "the decoder must be ByteLevel, or Metaspace / Replace with ByteFallback, Fuse and a leading Strip"
)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, with the special tokens that the files beside it name."""

    @classmethod
    def load(cls, folder: Path) -> JsonTokenizer:
        file = folder / "tokenizer.json"
        spec, config = read_json(file), read_json(folder / "tokenizer_config.json")
        cutter = _build(file.read_text(encoding="utf-8"), file)
        cutter.encode_special_tokens = bool(config.get("split_special_tokens"))
        added = _to_add(cutter, spec, declared_tokens(folder))
        _add(cutter, added, file)
        return cls(spec, cutter, added, file)

    def __init__(
        self,
        spec: dict[str, Any],
        cutter: tokenizers.Tokenizer,
        declared: list[tuple[tokenizers.AddedToken, int | None]],
        file: Path,
    ) -> None:
        """`declared`: the tokens and marks that tokenizer.json lacks (see `_to_add`), already in `cutter`."""
        spelling = _Spelling.of(spec.get("decoder"), file)
        added = cutter.get_added_tokens_decoder()
        vocab = cutter.get_vocab(with_added_tokens=True)
        special = {token for token, item in added.items() if item.special}
        size = max(vocab.values(), default=-1) + 1
        if size > MAX_VOCAB:
            raise CheckpointError(
                f"{file} has the id {size - 1}; ids go up to {MAX_VOCAB - 1}, fetch it again"
            )
        table = [b""] * size
        for text, token in vocab.items():
            if token not in special:
                table[token] = spelling.bytes_of(text, added=token in added)
        named = named_special_tokens(file.parent)
        bos, eos = named.get("bos_token"), named.get("eos_token")
        super().__init__(
            table,
            special,
            bos_id=vocab.get(bos) if isinstance(bos, str) else None,
            eos_id=vocab.get(eos) if isinstance(eos, str) else None,
            drops_first_space=spelling.drops_first_space,
            rules=_rules(spec["model"]),
            special_texts={token: added[token].content for token in special},
        )
        self._spec, self._file, self._declared = spec, file, declared
        self._cutter = cutter

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self._cutter.encode(text, add_special_tokens=special).ids)

    def _cut(self, text: str) -> list[int]:
        return list(self._continuation_cutter.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _continuation_cutter(self) -> tokenizers.Tokenizer:
        """The same vocabulary, without what changes or adds characters; built where texts are bridged."""
        spec = self._spec | {
            "normalizer": _without_rewriting(self._spec.get("normalizer")),
            "pre_tokenizer": _without_prefix(self._spec.get("pre_tokenizer")),
            "post_processor": None,
        }
        cutter = _build(json.dumps(spec), self._file)
        _add(cutter, self._declared, self._file)
        cutter.encode_special_tokens = True
        return cutter


def _build(spec: str, file: Path) -> tokenizers.Tokenizer:
    try:
        cutter = tokenizers.Tokenizer.from_str(spec)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{file}: the tokenizers library cannot read it ({error}); fetch it again"
        ) from error
    cutter.no_truncation()
    cutter.no_padding()
    return cutter


def _to_add(
    cutter: tokenizers.Tokenizer, spec: dict[str, Any], declared: list[AddedToken]
) -> list[tuple[tokenizers.AddedToken, int | None]]:
    """What the files beside tokenizer.json say and it does not, in transformers' order: tokens that it
    lacks, with the ids that they shall have, and other marks for those that it has.
    """
    unknown = spec["model"].get("unk_token")  # an unknown token has no text either
    if unknown and cutter.token_to_id(unknown) is not None:
        declared = [*declared, AddedToken(unknown, special=True)]
    added = {item.content: item for item in cutter.get_added_tokens_decoder().values()}
    found = []
    for token in declared:
        have = added.get(token.text)
        marks = token if token.has_flags or have is None else have
        wanted = tokenizers.AddedToken(
            token.text,
            single_word=marks.single_word,
            lstrip=marks.lstrip,
            rstrip=marks.rstrip,
            normalized=marks.normalized,
            special=token.special or (have is not None and have.special),
        )
        if have is None or repr(have) != repr(wanted):
            is_new = have is None and cutter.token_to_id(token.text) is None
            found.append((wanted, token.id if is_new else None))
            added[token.text] = wanted
    return found


def _add(
    cutter: tokenizers.Tokenizer, tokens: list[tuple[tokenizers.AddedToken, int | None]], file: Path
) -> None:
    """Add tokens; CheckpointError where one cannot have the id that it shall have."""
    cutter.add_tokens([token for token, _ in tokens])
    for token, wanted in tokens:
        got = cutter.token_to_id(token.content)
        if wanted is not None and got != wanted:
            raise CheckpointError(
                f"{file}: {token.content!r} has the id {wanted} in the files beside it and would get {got}, "
                f"the next free one; give the tokenizer.json that belongs to them"
            )


def _rules(model: dict[str, Any]) -> tuple[str, str]:
    """What orders the cuts: the merges of BPE, in either notation, or the scores of a unigram model."""
    if "merges" in model:
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return "merges", hashlib.sha256("\n".join(pairs).encode("utf-8")).hexdigest()
    scores = model["vocab"] if isinstance(model["vocab"], list) else []
    return "scores", hashlib.sha256(json.dumps(scores).encode("utf-8")).hexdigest()


def _flatten(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a (possibly nested) Sequence, in order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for item in part[key] for step in _flatten(item, key)]
    return [part]


def _without_rewriting(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """Only the notation of spaces stays; Unicode forms, stripping and the dummy prefix change the text."""
    steps = _flatten(normalizer, "normalizers")
    spaces = [step for step in steps if step["type"] == "Replace" and step["pattern"].get("String") == " "]
    return {"type": "Sequence", "normalizers": spaces}


def _without_prefix(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same splits, with no space put in front."""
    steps = _flatten(pre_tokenizer, "pretokenizers")
    if not steps:
        return None
    changed = [
        {k: v for k, v in step.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
        if step["type"] == "Metaspace"
        else step | ({"add_prefix_space": False} if step["type"] == "ByteLevel" else {})
        for step in steps
    ]
    return {"type": "Sequence", "pretokenizers": changed}
