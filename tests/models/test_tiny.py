"""The models the other tests run on have the properties those tests count on."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.tiny import CONFIDENT, UNSURE, HashModel, write_tiny_checkpoint

PREFIXES = [[7, i % 5, i] for i in range(600)]


def tops(model: HashModel) -> torch.Tensor:
    """The likeliest token [600] after each prefix."""
    return torch.stack([model(ids) for ids in PREFIXES]).argmax(dim=-1)


def test_a_hash_model_depends_on_its_seed_and_on_all_it_reads() -> None:
    model = HashModel(seed=1)
    assert torch.equal(model([1, 2, 3]), HashModel(seed=1)([1, 2, 3]))
    for other in (model([0, 2, 3]), model([1, 2]), model([2, 1, 3]), model([]), HashModel(seed=2)([1, 2, 3])):
        assert not torch.equal(model([1, 2, 3]), other)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_hash_model_is_confident_as_often_as_asked(share: float) -> None:
    model = HashModel(seed=3, confident=share)
    prob = torch.stack([model(ids) for ids in PREFIXES]).softmax(dim=-1).max(dim=-1).values
    sure = (prob >= CONFIDENT[0]) & (prob <= CONFIDENT[1])
    unsure = (prob >= UNSURE[0]) & (prob <= UNSURE[1])
    assert bool((sure | unsure).all())
    assert sure.float().mean().item() == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_a_hash_model_agrees_as_often_as_asked(agreement: float) -> None:
    base = HashModel(seed=4, confident=0.5)
    guide = HashModel(seed=5, agrees_with=base, agreement=agreement)
    by_chance = (1 - agreement) / base.vocab
    agreed = (tops(base) == tops(guide)).float().mean().item()
    assert agreed == pytest.approx(agreement + by_chance, abs=0.06)


def test_a_hash_model_ends_as_often_as_asked() -> None:
    model = HashModel(seed=6, eos=3, eos_rate=0.25)
    assert (tops(model) == 3).float().mean().item() == pytest.approx(0.25 + 0.75 / 32, abs=0.06)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_tiny_checkpoint_is_sure_here_and_unsure_there(family: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "model", family, seed=2, padded_vocab=333, eos=(1, 40, 41))
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Sure, let me think step by step.\n  Où est le café?", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Sure, let me think step by step.\n  Où est le café?"
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        prob, _ = model(ids).logits[0].softmax(dim=-1).max(dim=-1)
    assert model.config.vocab_size == 333
    assert GenerationConfig.from_pretrained(path).eos_token_id == [1, 40, 41]
    assert 0.1 < (prob < 0.4).float().mean().item() < 0.95


def test_a_tiny_checkpoint_is_its_seed(tmp_path: Path) -> None:
    paths = [write_tiny_checkpoint(tmp_path / str(i), seed=seed) for i, seed in enumerate([1, 1, 2])]
    first, again, other = ((path / "model.safetensors").read_bytes() for path in paths)
    assert first == again
    assert first != other
    assert (paths[0] / "tokenizer.json").read_bytes() == (paths[2] / "tokenizer.json").read_bytes()
