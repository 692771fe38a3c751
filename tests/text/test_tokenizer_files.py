"""What the files beside a vocabulary say of its tokens is what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from nudging.errors import CheckpointError
from nudging.text.chat_template import load_chat_template
from nudging.text.loading import load_tokenizer
from nudging.text.tokenizer import Tokenizer
from tests.text.test_chat import CHATML

SIZE = 256


def vocabulary(**parts: Any) -> tokenizers.Tokenizer:
    """A tokenizer.json with a token for every byte, and <s> and </s> behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    cutter = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    cutter.add_special_tokens(["<s>", "</s>"])
    for name, part in parts.items():
        setattr(cutter, name, part)
    return cutter


def mark(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    marks = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}
    return {"content": content, "special": special, **marks}


OLD = {"256": mark("<s>"), "257": mark("</s>")}
IM = {"258": mark("<|im_start|>"), "259": mark("<|im_end|>")}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
# tokenizer_config.json, and other files, beside the same tokenizer.json.
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "names": {"config": NAMED},
    "names as objects": {
        "config": {
            "bos_token": {"__type": "AddedToken", **mark("<s>")},
            "eos_token": {"__type": "AddedToken", **mark("</s>", rstrip=True)},
        }
    },
    "tokens only listed": {
        "config": {**NAMED, "eos_token": "<|im_end|>", "added_tokens_decoder": {**OLD, **IM}}
    },
    "tokens that are no special ones": {
        "config": {
            **NAMED,
            "added_tokens_decoder": {**OLD, **IM, "260": mark("<think>", False), "261": mark("ab", False)},
        }
    },
    "white space": {
        "config": {
            **NAMED,
            "added_tokens_decoder": {
                **OLD,
                "258": mark("<l>", lstrip=True),
                "259": mark("<r>", rstrip=True),
                "260": mark("<b>", lstrip=True, rstrip=True),
                "261": mark("word", False, single_word=True),
                "262": mark("Upper", False, normalized=True),
            },
        }
    },
    "other marks than tokenizer.json's": {
        "config": {**NAMED, "added_tokens_decoder": {"256": mark("<s>"), "257": mark("</s>", lstrip=True)}}
    },
    "names of unknown tokens": {"config": {**NAMED, "pad_token": "<pad>", "unk_token": "<unk>"}},
    "an old list": {"config": {**NAMED, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "an old list of objects": {
        "config": {
            **NAMED,
            "additional_special_tokens": [
                {"__type": "AddedToken", **mark("<|im_start|>")},
                {"__type": "AddedToken", **mark("<|im_end|>", rstrip=True)},
            ],
        }
    },
    "a new list": {"config": {**NAMED, "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "an empty new list beside an old one": {
        "config": {**NAMED, "extra_special_tokens": [], "additional_special_tokens": ["<|im_end|>"]}
    },
    "an object": {
        "config": {**NAMED, "extra_special_tokens": {"image_token": "<img>", "boi_token": "<boi>"}}
    },
    "an object beside listed ones": {
        "config": {
            **NAMED,
            "added_tokens_decoder": {**OLD, **IM, "260": mark("<img>")},
            "extra_special_tokens": {"image_token": "<img>"},
        }
    },
    "a name of its own": {"config": {**NAMED, "image_token": "<img>"}},
    "a map": {"special_tokens_map": {"bos_token": "<s>", "eos_token": mark("<|im_end|>")}},
    "a map against names": {"config": NAMED, "special_tokens_map": {"eos_token": "<|im_end|>"}},
    "a map against a list": {
        "config": {**NAMED, "added_tokens_decoder": {**OLD, **IM}},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    },
    "a map of tokens that a list lacks": {
        "config": {**NAMED, "added_tokens_decoder": {}},
        "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<img>"]},
    },
    "added_tokens.json": {
        "config": {**NAMED, "eos_token": "<|im_end|>"},
        "added_tokens": {"<|im_start|>": 258, "<|im_end|>": 259},
    },
    "special tokens that are split": {
        "config": {**NAMED, "split_special_tokens": True, "added_tokens_decoder": {**OLD, **IM}}
    },
    "flags for BOS and EOS": {"config": {**NAMED, "add_bos_token": True, "add_eos_token": True}},
}
PARTS: dict[str, dict[str, Any]] = {
    "no post-processor": {},
    "BOS in front": {
        "post_processor": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    },
    "BOS and EOS": {
        "post_processor": processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    },
    "bytes, then BOS": {
        "post_processor": processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)]),
            ]
        )
    },
    "lower case": {"normalizer": normalizers.Lowercase()},
}
TEXTS = [
    "plain abba",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a <l> b <r> c <b> d</s> e",
    "word words sword a word, Upper upper",
    "<think>x</think> <img><boi><pad><unk> cab",
    " </s> <s> ",
    "",
]


def pair(folder: Path, variant: str, parts: str) -> tuple[Tokenizer, transformers.PreTrainedTokenizerFast]:
    """The same files as read here and by transformers."""
    vocabulary(**PARTS[parts]).save(str(folder / "tokenizer.json"))
    files = dict(VARIANTS[variant])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.pop("config", {})}
    for name, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    mine = load_tokenizer(folder)
    assert mine is not None
    return mine, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("parts", list(PARTS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_texts_become_the_ids_of_transformers(tmp_path: Path, variant: str, parts: str) -> None:
    mine, theirs = pair(tmp_path, variant, parts)
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text), text
        ids = theirs.encode(text, add_special_tokens=False)
        assert mine.encode(text, special=False) == ids, text
        assert not any(mine.is_special(token) for token in mine.encode_continuation(text))
        assert mine.bytes_of(mine.encode_continuation(text)) == text.encode()
    for name in ("bos", "eos"):
        theirs_id = getattr(theirs, f"{name}_token_id")
        if theirs_id is not None:
            assert getattr(mine, f"{name}_id") == theirs_id
    for token in theirs.all_special_ids:
        assert mine.is_special(token)
        assert mine.token_bytes(token) == b""
    assert mine.vocab_size == len(theirs)


def test_a_chat_of_listed_tokens_is_read_as_tokens(tmp_path: Path) -> None:
    mine, theirs = pair(tmp_path, "tokens only listed", "no post-processor")
    theirs.chat_template = CHATML
    theirs.save_pretrained(tmp_path / "saved")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    template = load_chat_template(tmp_path)
    assert template is not None
    chat = [{"role": "user", "content": "Hi"}]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert template.encode(mine, chat) == ids
    assert ids[0] == 258
    assert mine.eos_id == 259
    saved = load_tokenizer(tmp_path / "saved")
    assert saved is not None
    assert template.encode(saved, chat) == ids


def test_a_token_that_cannot_have_its_id_is_refused(tmp_path: Path) -> None:
    vocabulary().save(str(tmp_path / "tokenizer.json"))
    config = {"added_tokens_decoder": {"300": mark("<far>")}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'<far>' has the id 300 .* would get 258"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("listed", [[1], "x", {"258": "<x>x"}, {"258": {"content": 3}}, {"258": {}}])
def test_lists_that_are_none_are_refused(tmp_path: Path, listed: Any) -> None:
    vocabulary().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    if listed == {"258": "<x>x"}:
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer is not None
        assert tokenizer.encode("<x>x") == [258]
        return
    with pytest.raises(CheckpointError, match="added"):
        load_tokenizer(tmp_path)


SP: dict[str, dict[str, Any]] = {
    "listed": {"added_tokens_decoder": {"320": mark("<|im_start|>"), "321": mark("<|im_end|>")}},
    "named": {"pad_token": "<pad>", "eos_token": "</s>"},
    "a list": {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "an object": {"extra_special_tokens": {"image_token": "<img>"}},
    "words": {"added_tokens_decoder": {"320": mark("word", False, single_word=True)}},
}


@pytest.mark.parametrize("variant", list(SP))
def test_sentencepiece_models_get_the_tokens_listed_beside_them(
    tmp_path: Path, variant: str, pieces: Path
) -> None:
    shutil.copy(pieces, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **SP[variant]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mine, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert mine is not None
    assert mine.vocab_size == len(theirs)
    for text in ("<|im_start|>user<|im_end|>", "a<pad>b", "<img> cat", "word words", "the cat</s>"):
        assert mine.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 320 pieces."""
    from tests.text.test_tokenizer import train_pieces

    folder = tmp_path_factory.mktemp("pieces")
    train_pieces(folder, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    return folder / "tokenizer.model"
