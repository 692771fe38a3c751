"""Tokenizers: every token has its exact bytes, special tokens none, and bad input is told so."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nudging.errors import BadRequest, CheckpointError
from nudging.text.loading import load_tokenizer
from nudging.text.tokenizer import Tokenizer
from nudging.text.tokenizer_json import JsonTokenizer
from tests.support.fake import TableTokenizer
from tests.support.texts import ANY_TEXT

PROPERTY = settings(max_examples=60)

# Small tokenizers of each kind are made here, so that these claims need no data from outside.

SENTENCES = [
    f"The {noun} that {verb}s by the {place} is old."
    for noun, verb, place in product(("cat", "heron", "man"), ("sing", "sleep"), ("house", "mill", "sea"))
]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE, the kind of Llama 3, Qwen and OLMo."""
    cutter = tokenizers.Tokenizer(models.BPE())
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    cutter.train_from_iterator(SENTENCES, trainer)
    cutter.add_tokens(["<tool>"])
    cutter.add_special_tokens(["<|bos|>", "<|eos|>"])
    bos = ("<|bos|>", cutter.token_to_id("<|bos|>"))
    cutter.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    spec: dict[str, Any] = json.loads(cutter.to_str())
    return spec


def train_pieces(folder: Path, **options: Any) -> bytes:
    """A tokenizer.model of 320 pieces with byte fallback."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return (folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sentencepiece BPE, the kind of Llama 2 and Gemma."""
    folder = tmp_path_factory.mktemp("sp")
    return train_pieces(
        folder, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    )


Make = Callable[..., Tokenizer]


DEEP = b'{"x":' * 5000


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Load a tokenizer from files given by name: `model` is tokenizer.model, any other is JSON."""
    number = count()

    def load(**files: Any) -> Tokenizer:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        for name, content in files.items():
            file = folder / ("tokenizer.model" if name == "model" else f"{name}.json")
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        return tokenizer

    return load


def changed(spec: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return copy.deepcopy(spec) | parts


def with_added(spec: dict[str, Any], *texts: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    first = len(spec["model"]["vocab"]) + 3
    return changed(
        spec,
        added_tokens=spec["added_tokens"]
        + [{"id": first + i, "content": text} | flags for i, text in enumerate(texts)],
    )


CONFIG: dict[str, Any] = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}}


def test_special_tokens_are_recognised_and_have_no_text(make: Make, byte_level: dict[str, Any]) -> None:
    tokenizer = make(tokenizer=byte_level, tokenizer_config=CONFIG)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert bos is not None
    assert eos is not None
    ids = tokenizer.encode("<|bos|>cat<|eos|>")
    assert ids[:2] == [bos, bos]
    assert ids[-1] == eos
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.is_special(eos)
    assert tokenizer.token_bytes(eos) == b""
    without = make(tokenizer=changed(byte_level, added_tokens=[], post_processor=None))
    text = "<|eos|> " + SENTENCES[-1]
    assert tokenizer.encode_continuation(text) == without.encode(text)


def test_a_token_is_special_where_only_the_configuration_says_so(
    make: Make, byte_level: dict[str, Any]
) -> None:
    tokenizer = make(tokenizer=byte_level, tokenizer_config=CONFIG | {"eos_token": "<tool>"})
    assert tokenizer.eos_id is not None
    assert tokenizer.is_special(tokenizer.eos_id)
    assert tokenizer.bytes_of(tokenizer.encode_continuation("a<tool>")) == b"a<tool>"
    plain = make(tokenizer=byte_level, tokenizer_config=CONFIG)
    assert plain.token_bytes(tokenizer.eos_id) == b"<tool>"


def test_token_bytes_are_text_bytes_or_single_bytes(
    make: Make, byte_level: dict[str, Any], pieces: bytes
) -> None:
    for tokenizer in (make(tokenizer=byte_level), make(model=pieces)):
        written = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
        assert {bytes([value]) for value in range(256)} <= written
        assert b" old" in written
        (space,) = tokenizer.encode_continuation(" old")
        assert tokenizer.starts_with_space(space)
        assert not any(map(tokenizer.starts_with_space, tokenizer.encode_continuation("old\n\t\u00a0")))


def test_ids_beyond_the_vocabulary_are_refused_by_name(make: Make, byte_level: dict[str, Any]) -> None:
    tokenizer = make(tokenizer=byte_level)
    limit = tokenizer.vocab_size
    for bad in (limit, -1):
        with pytest.raises(BadRequest, match=f"{bad} is not in the vocabulary.*0 to {limit - 1}"):
            tokenizer.decode([0, bad])
    assert tokenizer.token_bytes(limit) == b"", "a padding row of the embedding has no text"


def test_padding_and_more_special_tokens_leave_it_the_same(make: Make, byte_level: dict[str, Any]) -> None:
    base = make(tokenizer=byte_level)
    instruct = make(tokenizer=with_added(byte_level, "<|user|>", "<|assistant|>", special=True))
    assert instruct.vocab_size == base.vocab_size + 2
    assert base.same_as(instruct)
    assert instruct.same_as(base)


def test_merges_in_either_notation_are_the_same(make: Make, byte_level: dict[str, Any]) -> None:
    model = byte_level["model"]
    joined = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    assert make(tokenizer=byte_level).same_as(make(tokenizer=changed(byte_level, model=joined)))


def test_other_text_at_an_id_or_other_merges_make_it_another(make: Make, byte_level: dict[str, Any]) -> None:
    base = make(tokenizer=byte_level)
    model = byte_level["model"]
    (one, first), (two, second) = list(model["vocab"].items())[40:42]
    swapped = model | {"vocab": model["vocab"] | {one: second, two: first}}
    reordered = model | {"merges": model["merges"][::-1]}
    assert not base.same_as(make(tokenizer=changed(byte_level, model=swapped)))
    assert not base.same_as(make(tokenizer=changed(byte_level, model=reordered)))
    assert not base.same_as(make(tokenizer=with_added(byte_level, "<think>", special=False)))


def test_unicode_forms_are_kept_apart_in_a_continuation(make: Make, byte_level: dict[str, Any]) -> None:
    tokenizer = make(tokenizer=changed(byte_level, normalizer={"type": "NFKC"}))
    assert tokenizer.decode(tokenizer.encode("\ufb01")) == "fi"
    assert tokenizer.text_of(tokenizer.encode_continuation("\ufb01 e\u0301")) == "\ufb01 e\u0301"


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
UNSPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
BYTES_AND_FUSE = [{"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
KINDS: dict[str, dict[str, Any]] = {
    "llama-2": {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, SPACES]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [UNSPACES, *BYTES_AND_FUSE, STRIP]},
    },
    "llama-2 by metaspace": {
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "decoder": {"type": "Sequence", "decoders": [UNSPACES, *BYTES_AND_FUSE, STRIP]},
    },
    "gemma": {
        "normalizer": SPACES,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": [UNSPACES, *BYTES_AND_FUSE]},
    },
}


@pytest.fixture(scope="module")
def byte_fallback() -> dict[str, Any]:
    """A tokenizer.json with pieces like sentencepiece's; what reads and writes its spaces is in KINDS."""
    cutter = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    cutter.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"], show_progress=False)
    cutter.train_from_iterator(SENTENCES, trainer)
    spec: dict[str, Any] = json.loads(cutter.to_str())
    vocab = spec["model"]["vocab"]
    vocab |= {f"<0x{value:02X}>": len(vocab) + value for value in range(256)}
    return spec


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(text=ANY_TEXT)
def test_byte_fallback_vocabularies_in_json_are_exact(
    byte_fallback: dict[str, Any], kind: str, text: str
) -> None:
    spec = byte_fallback | KINDS[kind]
    tokenizer = JsonTokenizer(
        spec, reference := tokenizers.Tokenizer.from_str(json.dumps(spec)), [], Path("none")
    )
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.bytes_of(tokenizer.encode_continuation(text)) == text.encode()


def test_one_vocabulary_is_one_tokenizer_however_spaces_are_written(
    make: Make, byte_fallback: dict[str, Any]
) -> None:
    first, *others = (make(tokenizer=byte_fallback | kind) for kind in KINDS.values())
    assert all(first.same_as(other) for other in others)
    assert len({tuple(each.encode_continuation(SENTENCES[-1])) for each in (first, *others)}) == 1


def test_a_character_without_tokens_is_refused_in_a_continuation(
    make: Make, byte_level: dict[str, Any]
) -> None:
    vocab = {text: i for i, text in enumerate("abc")}
    spec = changed(
        byte_level, model=byte_level["model"] | {"vocab": vocab, "merges": []}, post_processor=None
    )
    tokenizer = make(tokenizer=spec)
    assert tokenizer.encode_continuation("cab") == [2, 0, 1]
    with pytest.raises(BadRequest, match=r"'d' \(U\+0064\).*byte fallback"):
        tokenizer.encode_continuation("cabd")


def test_sentencepiece_puts_one_space_in_front_of_a_whole_text_only(make: Make, pieces: bytes) -> None:
    tokenizer = make(model=pieces)
    assert tokenizer.bytes_of(tokenizer.encode("old man")) == b" old man"
    assert tokenizer.decode(tokenizer.encode(" old man")) == " old man"
    assert tokenizer.bytes_of(tokenizer.encode_continuation("old man")) == b"old man"
    assert tokenizer.bytes_of(tokenizer.encode("a</s>b")) == b" ab", "no space after a special token"
    legacy = make(model=pieces, tokenizer_config={"legacy": True})
    assert legacy.bytes_of(legacy.encode("a</s>b")) == b" a b"


@pytest.fixture(scope="module")
def rewriting(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece unigram model that rewrites characters and drops double spaces."""
    folder = tmp_path_factory.mktemp("unigram")
    train_pieces(folder, model_type="unigram", normalization_rule_name="nmt_nfkc", hard_vocab_limit=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@PROPERTY
@given(text=ANY_TEXT)
def test_a_continuation_keeps_what_a_whole_text_has_rewritten(rewriting: Tokenizer, text: str) -> None:
    assert rewriting.decode(rewriting.encode("\ufb01  x ")) == "fi x"
    assert rewriting.bytes_of(rewriting.encode_continuation(text)) == text.encode()


def test_sentencepiece_adds_what_its_configuration_says(make: Make, pieces: bytes) -> None:
    bare = make(model=pieces).encode("old", special=False)
    for config, front, back in [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"eos_token": "<end>", "add_eos_token": True}, [1], [321]),
    ]:
        tokenizer = make(model=pieces, tokenizer_config=config, added_tokens={"<tool>": 320, "<end>": 321})
        assert tokenizer.encode("old") == [*front, *bare, *back]
        assert tokenizer.token_bytes(320) == b"<tool>"
        assert tokenizer.is_special(321) == ("eos_token" in config)
        assert tokenizer.vocab_size == 322


def test_added_tokens_take_the_white_space_that_they_ask_for(make: Make, pieces: bytes) -> None:
    listed = {"320": {"content": "<|end|>", "special": True, "rstrip": True}, "321": {"content": "<|end|>x"}}
    tokenizer = make(model=pieces, tokenizer_config={"added_tokens_decoder": listed})
    bare = tokenizer.encode("a", special=False)
    assert tokenizer.encode("a<|end|> \n<|end|>x", special=False) == [*bare, 320, 321], (
        "the longest token wins"
    )


def test_lone_surrogates_are_refused(make: Make, byte_level: dict[str, Any], pieces: bytes) -> None:
    for tokenizer in (make(tokenizer=byte_level), make(model=pieces)):
        for encode in (tokenizer.encode, tokenizer.encode_continuation):
            with pytest.raises(BadRequest, match=r"U\+D800 at position 2"):
                encode("ab\ud800")


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_damaged_files_are_refused(make: Make, byte_level: dict[str, Any], pieces: bytes) -> None:
    word_piece = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    for files, reason in [
        ({"tokenizer": b'{"version": '}, "is not JSON"),
        ({"tokenizer": b"[]"}, "holds a JSON list, it must hold an object"),
        ({"tokenizer": DEEP}, r"tokenizer\.json is nested too deep for JSON"),
        ({"tokenizer": byte_level, "tokenizer_config": DEEP}, r"tokenizer_config\.json is nested too deep"),
        ({"tokenizer": byte_level, "special_tokens_map": DEEP}, "special_tokens_map.json is nested too deep"),
        ({"tokenizer": byte_level, "added_tokens": DEEP}, "added_tokens.json is nested too deep"),
        ({"model": pieces, "tokenizer_config": DEEP}, r"tokenizer_config\.json is nested too deep"),
        ({"tokenizer": {"model": {}}}, "cannot read it"),
        ({"tokenizer": changed(byte_level, decoder=word_piece)}, "decoder must be ByteLevel"),
        ({"tokenizer": changed(byte_level, decoder=None)}, "decoder must be ByteLevel"),
        ({"model": b"not a model"}, "not a sentencepiece model"),
        ({"model": pieces[:1000]}, "not a sentencepiece model"),
        ({"model": pieces, "added_tokens": {"<far>": 10**12}}, "ids go up to"),
        (
            {"model": pieces, "tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}},
            "x.*is none",
        ),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            make(**files)


def test_tokenizers_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, nudging.text.tokenizer_json, nudging.text.tokenizer_sp, nudging.text.detokenizer;"
        "import nudging.text.chat_template;"
        "assert not (found := {'torch', 'transformers'} & set(sys.modules)), found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_tables_are_compared_once_however_many_requests_ask() -> None:
    class Counted(bytes):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return bytes(self) == other

        __hash__ = bytes.__hash__

    one, other = (TableTokenizer([Counted(bytes([i])) for i in range(256)]) for _ in range(2))
    for _ in range(100):
        assert one.same_as(other)
    assert 0 < Counted.compared < 1000
