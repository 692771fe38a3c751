"""The two tokenizers of the family and the files by which other programs load them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from dialogue import TAGS, dialogue
from prose import document
from world import STRANGE

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL = (UNK, BOS, EOS, *TAGS)  # ids 0, 1, 2, 3, ... in both tokenizers
BOS_ID, EOS_ID = 1, 2
SIZE = 2048

# Digits one by one, so that sums are learned column by column; a word carries the space before it.
_SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"

ASSISTANT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}User: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
BASE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "Answer: {{ message['content'] }}\n{% else %}Question: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


class Codec(Protocol):
    """Text to ids, without the begin-of-text token; tags in the text become their ids."""

    def encode(self, text: str) -> list[int]: ...


class BytePairs:
    """The byte-level BPE (`tokenizer.json`) that four of the five share."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class SentencePieces:
    """The SentencePiece model (`tokenizer.model`) of `guide-sp`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)


def corpus(documents: int = 12000, seed: int = 0) -> Iterator[str]:
    """What both tokenizers are trained on: prose and dialogues of the strange world.

    Its people are many, so names are cut into syllables: who learns to copy one name can copy them all.
    """
    rng = random.Random(seed)
    for _ in range(documents):
        yield document(rng, STRANGE)
        if rng.random() < 0.33:
            said = dialogue(rng, STRANGE)
            yield said.prompt + said.answer


def train_byte_pairs(path: Path) -> None:
    """Train the byte-level BPE and write `tokenizer.json`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def train_sentence_pieces(path: Path) -> None:
    """Train the SentencePiece BPE, byte fallback for what it has not seen, and write `tokenizer.model`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in corpus() for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        unk_id=0,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        user_defined_symbols=list(TAGS),
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # a text begins as it is, so that after a special token it reads the same
        num_threads=1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def write_settings(folder: Path, *, template: str, pieces: bool, context: int) -> None:
    """Write `tokenizer_config.json` next to a tokenizer's own file."""
    settings = {
        "tokenizer_class": "LlamaTokenizer" if pieces else "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "additional_special_tokens": list(TAGS),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    if pieces:
        settings |= {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": False,
            "legacy": False,
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
