"""Small things to test with: models made of a hash, and random checkpoints with a tokenizer of their own."""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CONFIDENT = (0.75, 0.99)  # the top-1 probabilities of a sure row
UNSURE = (0.10, 0.30)  # and of an unsure one

CORPUS = [
    "The base speaks; where it is unsure, the guide speaks instead, and then the base goes on.",
    "Sure, let me think step by step. How many apples are left? 12 - 5 = 7 apples are left.",
    "Several language models write one text together: a large one and a small one, word for word.",
    "def speak(text):\n    return text + ' and so on'\n",
    "Où est le café? Das weiß ich nicht. Answer: 42.",
]


@dataclass(frozen=True)
class HashModel:
    """A language model that is a hash of all the ids it reads: instant, deterministic, without any state.

    Its row is normal noise times `sharpness` (vocab >= 16 for the promises below).  With `confident`, a
    probability, that share of the rows has a top-1 probability within CONFIDENT and the others within UNSURE.
    With `agrees_with`, the likeliest token is the other model's in a share `agreement` of the rows (more by
    chance); both must read the same ids.  With `eos`, that id is the likeliest in a share `eos_rate` of the
    rows where the model does not agree.
    """

    seed: int
    vocab: int = 32
    sharpness: float = 2.0
    confident: float | None = None
    agrees_with: "HashModel | None" = None
    agreement: float = 0.0
    eos: int | None = None
    eos_rate: float = 0.0

    def __call__(self, ids: list[int]) -> Tensor:
        """The logits [vocab] fp32 after `ids`."""
        packed = struct.pack(f"<{len(ids) + 1}q", self.seed, *ids)
        draw = np.random.default_rng(
            int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")
        )
        row = draw.standard_normal(self.vocab) * self.sharpness
        agrees, ends, sure, level = draw.random(4)
        if self.agrees_with is not None and agrees < self.agreement:
            _swap_top(row, int(self.agrees_with(ids).argmax()))
        elif self.eos is not None and ends < self.eos_rate:
            _swap_top(row, self.eos)
        if self.confident is not None:
            low, high = CONFIDENT if sure < self.confident else UNSURE
            _set_top_prob(row, low + (high - low) * level)
        return torch.from_numpy(row.astype(np.float32))


def _swap_top(row: NDArray[np.float64], token: int) -> None:
    """Give `token` the largest logit."""
    top = int(row.argmax())
    row[[top, token]] = row[[token, top]]


def _set_top_prob(row: NDArray[np.float64], prob: float) -> None:
    """Flatten the rest of the row and give the largest logit the probability `prob`."""
    top = int(row.argmax())
    row *= 0.2 / row.std()
    rest = np.logaddexp.reduce(np.delete(row, top))
    row[top] = rest + math.log(prob / (1 - prob))


def write_tiny_tokenizer(path: Path, vocab: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <s> (0) and </s> (1), trained here, written to `path`; vocab >= 258."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return fast


def write_tiny_checkpoint(
    path: Path,
    family: str = "llama",
    seed: int = 0,
    vocab: int = 320,
    lm_head_scale: float = 3.0,
    eos: Sequence[int] = (1,),
    padded_vocab: int | None = None,
    **config: object,
) -> Path:
    """A random fp32 checkpoint directory with a tokenizer, as transformers writes it; returns `path`.

    family: transformers' model type ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo",
    "olmo2", "phi3", ...).  vocab: the tokenizer's; padded_vocab: the model's, where larger.  lm_head_scale:
    the standard deviation of the logits; at 3 the top-1 probability falls on both sides of 0.4.  eos: the ids
    that end a text.  config: further entries of config.json.
    """
    sizes = {
        "vocab_size": padded_vocab or vocab,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,  # as large as 1 / sqrt(hidden): what attention reads must matter
        "bos_token_id": 0,
        "eos_token_id": eos[0],
        "pad_token_id": None,
    }
    if family in ("gemma2", "gemma3_text", "qwen3"):
        sizes["head_dim"] = 16
    model_config = AutoConfig.for_model(family, **(sizes | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight) * 0.1)
            head = model.get_output_embeddings().weight
            head.normal_(std=lm_head_scale / math.sqrt(head.shape[1]))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=list(eos))
    model.save_pretrained(path)
    write_tiny_tokenizer(path, vocab)
    return path
