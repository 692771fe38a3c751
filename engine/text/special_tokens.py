"""What a checkpoint's small JSON files say of its tokens: which are added, which are special."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nudging.errors import CheckpointError
from nudging.files.json_file import read_object

MAX_VOCAB = 2**24  # ids; no real vocabulary comes near, a damaged file may
MAX_BYTES = 256 << 20  # a tokenizer.json of 256,000 tokens and their merges is about 35 MB

_CUSTOMARY = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where the file does not exist.  CheckpointError: not a JSON object."""
    # The libraries that wrote these files read the last of two equal keys.
    return read_object(file, MAX_BYTES, unique_keys=False) if file.is_file() else {}


def named_special_tokens(folder: Path) -> dict[str, str | list[str]]:
    """The special tokens that have a name (`bos_token` ...), as text, from the two files that list them.

    special_tokens_map.json has the last word unless tokenizer_config.json lists all tokens itself, as
    transformers has it.  Those without a name are `additional_special_tokens`.
    """
    found: dict[str, str | list[str]] = {}
    for name, item in _named(folder, with_map=True).items():
        texts = [_content(one) or "" for one in (item if isinstance(item, list) else [item])]
        found[name] = texts if isinstance(item, list) else texts[0]
    return found


def _named(folder: Path, with_map: bool) -> dict[str, Any]:
    """The same, each token as its file has it: a text, or an object with content and flags.

    with_map: special_tokens_map.json is read even where tokenizer_config.json lists all tokens.
    """
    config, old = (read_json(folder / n) for n in ("tokenizer_config.json", "special_tokens_map.json"))
    files = [config, old]
    if "added_tokens_decoder" in config:
        files = [old, config] if with_map else [config]
    found: dict[str, Any] = {}
    for key, value in [item for file in files for item in file.items()]:
        if key.endswith("_token") and _content(value) is not None:
            found[key] = value
        elif key == "extra_special_tokens" and isinstance(value, dict):
            found |= {name: item for name, item in value.items() if _content(item) is not None}
        elif key in _LISTS and isinstance(value, list) and value:
            found["additional_special_tokens"] = [item for item in value if _content(item) is not None]
    return found


@dataclass(frozen=True)
class AddedToken:
    """A token beside the model's own vocabulary: it is looked for in a text before the text is cut."""

    text: str
    special: bool
    id: int | None = None  # None where no file says it
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False
    single_word: bool = False  # only where no letter or digit touches it
    normalized: bool = False  # looked for in the text as the normalizer leaves it
    has_flags: bool = False  # whether a file gives these


def declared_tokens(folder: Path) -> list[AddedToken]:
    """The tokens that the files beside the vocabulary list: those with ids first, in the order of their ids.

    CheckpointError: an entry is not a token, or its id is beyond MAX_VOCAB.
    """
    named = {token.text: token for token in _in_order(_named(folder, with_map=False))}
    listed = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise CheckpointError(
            f"{folder}: added_tokens_decoder is {listed!r:.80}, it must be an object of tokens"
        )
    old = {str(token): {"content": text} for text, token in read_json(folder / "added_tokens.json").items()}
    found = {}
    for key, item in {**old, **listed}.items():
        text = _content(item)
        if not key.isdecimal() or int(key) >= MAX_VOCAB or not text:
            raise CheckpointError(
                f"{folder}: the added token {key}: {item} is none; ids go up to {MAX_VOCAB - 1}"
            )
        found[int(key)] = _token(item, text in named, int(key), key in listed)
    tokens = [found[key] for key in sorted(found)]
    known = {token.text for token in tokens}
    return tokens + [token for text, token in named.items() if text not in known]


def _token(item: Any, special: bool, token: int | None = None, has_flags: bool = False) -> AddedToken:
    flags = item if isinstance(item, dict) else {}
    special = special or bool(flags.get("special"))
    return AddedToken(
        _content(item) or "",
        special,
        token,
        lstrip=bool(flags.get("lstrip")),
        rstrip=bool(flags.get("rstrip")),
        single_word=bool(flags.get("single_word")),
        normalized=bool(flags.get("normalized", not special)),
        has_flags=has_flags,
    )


def _in_order(named: dict[str, Any]) -> list[AddedToken]:
    """The special tokens in the order in which transformers adds them: the customary names come first."""
    names = [*(n for n in _CUSTOMARY if n in named), *(n for n in named if n not in _CUSTOMARY)]
    single = [named[name] for name in names if not isinstance(named[name], list)]
    listed = [item for name in names if isinstance(named[name], list) for item in named[name]]
    return [_token(item, True) for item in (*single, *listed)]


def _content(value: object) -> str | None:
    """A special token's text, which checkpoints give plainly or as an object with flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
