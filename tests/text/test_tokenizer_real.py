"""Real tokenizers give the ids and the texts that their own libraries give; files from ../shared/data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nudging.text.loading import load_tokenizer
from nudging.text.tokenizer import Tokenizer
from tests.support.texts import ANY_TEXT, DATA, gsm8k

PROPERTY = settings(max_examples=60)


@dataclass(frozen=True)
class Real:
    """A real tokenizer, and what its own library makes of texts and ids."""

    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


@pytest.fixture(
    scope="module",
    params=["tokenizer_olmo2_dolma2.json", "tokenizer_olmo_gptneox.json", "tokenizer_llama2.model"],
)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    source = DATA / request.param
    if not source.is_file():
        pytest.skip(f"{request.param} is not in ../shared/data")
    target = tmp_path_factory.mktemp("real") / f"tokenizer{source.suffix}"
    shutil.copy(source, target)
    tokenizer = load_tokenizer(target.parent)
    assert tokenizer is not None
    if source.suffix == ".json":
        hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(target))
        return Real(tokenizer, hf.encode, lambda ids: str(hf.decode(ids, skip_special_tokens=True)))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(target))
    return Real(
        tokenizer, sp.encode, lambda ids: str(sp.decode([i for i in ids if not tokenizer.is_special(i)]))
    )


def test_real_texts_get_the_reference_ids_and_come_back(real: Real) -> None:
    for text in gsm8k(100):
        ids = real.tokenizer.encode(text, special=False)
        assert ids == real.encode(text)
        assert real.tokenizer.decode(ids) == text


@PROPERTY
@given(text=ANY_TEXT)
def test_any_text_gets_the_reference_ids(real: Real, text: str) -> None:
    ids = real.tokenizer.encode(text, special=False)
    assert ids == real.encode(text)
    assert real.tokenizer.decode(ids) == real.decode(ids)


@PROPERTY
@given(text=ANY_TEXT)
def test_a_continuation_is_exactly_its_bytes(real: Real, text: str) -> None:
    ids = real.tokenizer.encode_continuation(text)
    assert real.tokenizer.bytes_of(ids) == text.encode()
    assert not any(map(real.tokenizer.is_special, ids))


def test_a_continuation_is_cut_like_the_rest_of_a_whole_text(real: Real) -> None:
    start = "Well.\n"
    for text in gsm8k(20):
        ids = [*real.tokenizer.encode(start, special=False), *real.tokenizer.encode_continuation(text)]
        assert ids == real.encode(start + text)


@PROPERTY
@given(data=st.data())
def test_any_ids_decode_as_in_the_reference(real: Real, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, real.tokenizer.vocab_size - 1), max_size=20))
    expected = real.decode(ids)
    # sentencepiece makes one U+FFFD of every bad byte, a decode of the bytes one of each stretch of them.
    if real.tokenizer.bytes_of(ids).decode("utf-8", "ignore").encode() == real.tokenizer.bytes_of(ids):
        assert real.tokenizer.decode(ids) == expected


def test_llama_2_gets_the_ids_of_transformers(tmp_path: Path) -> None:
    if not (DATA / "tokenizer_llama2.model").is_file():
        pytest.skip("tokenizer_llama2.model is not in ../shared/data")
    shutil.copy(DATA / "tokenizer_llama2.model", tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mine, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert mine is not None
    # transformers' conversion merges double spaces otherwise than sentencepiece, which is normative here.
    texts = [text for text in gsm8k(100) if "  " not in text and not text.endswith(" ")]
    for text in [*texts, "<s>[INST] Hi! [/INST] Ho. </s><s>[INST] And? [/INST]", "a<unk>b", ""]:
        assert mine.encode(text) == theirs.encode(text)
        assert mine.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
    theirs.save_pretrained(tmp_path / "json")
    converted = load_tokenizer(tmp_path / "json")
    assert converted is not None
    assert converted.same_as(mine)
    assert mine.same_as(converted)
    assert [converted.token_bytes(i) for i in range(32000)] == [mine.token_bytes(i) for i in range(32000)]
