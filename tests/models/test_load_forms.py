"""The forms in which sound checkpoints come are read; what is wrong is told for what it is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from nudging.errors import CheckpointError
from nudging.models.loader import load_model
from nudging.text.roles import load_text_side
from tests.support.checkpoints import HIDDEN, VOCAB, make_tensors, write
from tests.support.hf_models import CASES, build_hf, exact_logits, random_ids

IDS = [1, 2, 3, 5, 8]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


def refusal(directory: Path) -> str:
    """The message of the CheckpointError that loading the directory raises."""
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    return str(caught.value)


def logits(directory: Path) -> Tensor:
    return load_model(directory).logits(IDS)


# ------------------------------------------------------------------------------------- tied and untied heads


@pytest.mark.parametrize("shape", [(VOCAB - 3, HIDDEN), (VOCAB + 5, HIDDEN), (VOCAB, HIDDEN - 1), (HIDDEN,)])
@pytest.mark.parametrize("times", range(3))
def test_the_head_of_a_tied_checkpoint_has_the_embeddings_shape(
    tmp_path: Path, shape: tuple[int, ...], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by its shape before any memory is taken: what memory holds by chance decides nothing."""
    tensors = make_tensors()
    tensors[HEAD] = torch.zeros(shape)
    if shape[0] < VOCAB and len(shape) == 2 and shape[1] == HIDDEN:
        tensors[HEAD] = tensors[EMBED][: shape[0]].clone()
    write(tmp_path, {"tie_word_embeddings": True}, tensors)
    monkeypatch.setattr("nudging.models.loader.Arena", None)
    message = refusal(tmp_path)
    assert f"lm_head.weight has shape {list(shape)}" in message
    assert "tie_word_embeddings" in message


def test_the_head_of_a_tied_checkpoint_has_a_dtype_that_is_read(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors[HEAD] = torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)
    assert "lm_head.weight is I8" in refusal(write(tmp_path, {"tie_word_embeddings": True}, tensors))


def test_an_untied_checkpoint_without_a_head_is_told_so(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors[HEAD]
    message = refusal(write(tmp_path, tensors=tensors))
    assert "no lm_head.weight" in message
    assert "tie_word_embeddings is false" in message
    assert "fetch it again" not in message


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-mha", "gemma2", "gemma3", "olmo2", "phi3-window"])
@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_names_without_the_usual_prefix_are_those_of_the_model(
    tmp_path: Path, name: str, prefix: str
) -> None:
    hf = build_hf(CASES[name], seed=5)
    hf.save_pretrained(tmp_path)
    tensors = {
        key if key.startswith("lm_head") else prefix + key.removeprefix("model."): value.clone()
        for key, value in hf.state_dict().items()
        if not (hf.config.tie_word_embeddings and key.startswith("lm_head"))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    ids = random_ids(hf.config.vocab_size, 24, seed=2)
    assert (load_model(tmp_path).logits(ids) - exact_logits(hf, ids)).abs().max() <= 1e-4


def test_a_tied_model_that_was_saved_without_its_head_loads(tmp_path: Path) -> None:
    hf = build_hf(CASES["qwen2-tied-mha"], seed=5)
    hf.base_model.save_pretrained(tmp_path)
    ids = random_ids(hf.config.vocab_size, 24, seed=2)
    assert (load_model(tmp_path).logits(ids) - exact_logits(hf, ids)).abs().max() <= 1e-4


LEFT: dict[str, dict[str, Tensor]] = {
    "value head": {"v_head.summary.weight": torch.ones(1, HIDDEN), "v_head.summary.bias": torch.ones(1)},
    "classifier": {"score.weight": torch.ones(1, HIDDEN)},
    "cached cosines": {
        f"model.layers.{i}.self_attn.rotary_emb.{what}_cached": torch.ones(1, 1, 32, 4)
        for i in range(2)
        for what in ("cos", "sin")
    },
    "inverse frequencies": {"model.rotary_emb.inv_freq": torch.ones(2)},
    "positions": {"model.embeddings.position_ids": torch.arange(32), "position_ids": torch.arange(3)},
}


@pytest.mark.parametrize("name", list(LEFT))
def test_leftovers_that_transformers_passes_over_are_left_out(tmp_path: Path, name: str) -> None:
    want = logits(write(tmp_path))
    write(tmp_path, tensors={**make_tensors(), **LEFT[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(tmp_path), want)


# --------------------------------------------------------------------------------------------------- shards


def shards(directory: Path, files: dict[str, dict[str, Tensor]], named: dict[str, str]) -> Path:
    """A checkpoint of these files with an index that places each tensor where `named` says, else first."""
    write(directory)
    (directory / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for file, tensors in files.items():
        (directory / file).parent.mkdir(exist_ok=True)
        save_file(tensors, directory / file)
        for name in tensors:
            weight_map.setdefault(name, file)
    weight_map |= named
    index = {"metadata": {"total_size": 1}, "weight_map": {k: v for k, v in weight_map.items() if v}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def halves() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    items = list(make_tensors().items())
    return dict(items[:9]), dict(items[9:])


def test_the_index_says_which_of_two_copies_counts(tmp_path: Path) -> None:
    want = logits(write(tmp_path))
    first, second = halves()
    second[EMBED] = first[EMBED].clone()
    assert torch.equal(logits(shards(tmp_path, {"a.safetensors": first, "b.safetensors": second}, {})), want)
    second[EMBED] = torch.zeros(3, 3)
    assert torch.equal(logits(shards(tmp_path, {"a.safetensors": first, "b.safetensors": second}, {})), want)
    first[EMBED], second[EMBED] = torch.zeros(VOCAB, HIDDEN), first[EMBED]
    named = {EMBED: "b.safetensors"}
    assert torch.equal(
        logits(shards(tmp_path, {"a.safetensors": first, "b.safetensors": second}, named)), want
    )


def test_what_the_index_does_not_name_is_not_of_the_checkpoint(tmp_path: Path) -> None:
    want = logits(write(tmp_path))
    first, second = halves()
    second["model.layers.7.stray"] = torch.ones(3)
    files = {"a.safetensors": first, "b.safetensors": second}
    assert torch.equal(logits(shards(tmp_path, files, {"model.layers.7.stray": ""})), want)
    assert "model.layers.7.stray" in refusal(shards(tmp_path, files, {}))
    assert "1 of 21 tensors are missing: model.norm" in refusal(
        shards(tmp_path, files, {"model.layers.7.stray": "", "model.norm.weight": ""})
    )


def test_shards_may_lie_in_a_folder(tmp_path: Path) -> None:
    want = logits(write(tmp_path))
    first, second = halves()
    files = {"weights/a.safetensors": first, "weights/b.safetensors": second}
    assert torch.equal(logits(shards(tmp_path, files, {})), want)


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "w/../../a.safetensors", "/a.safetensors", "w\\a.safetensors", "w//..", ""]
)
def test_shards_lie_in_the_checkpoints_own_directory(tmp_path: Path, file: str) -> None:
    first, second = halves()
    shards(tmp_path, {"a.safetensors": first, "b.safetensors": second}, {})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBED] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "a .safetensors file of this directory" in refusal(tmp_path)


def test_shards_without_their_index_are_named(tmp_path: Path) -> None:
    first, second = halves()
    shards(tmp_path, {"model-00001-of-00002.safetensors": first, "model-2.safetensors": second}, {})
    (tmp_path / "model.safetensors.index.json").unlink()
    message = refusal(tmp_path)
    assert "model-00001-of-00002.safetensors" in message
    assert "model.safetensors.index.json" in message


# ------------------------------------------------------------------------------------------- misleading words


def text_side(directory: Path) -> None:
    load_text_side(directory)


POINTERS: dict[str, Callable[[Path], Any]] = {
    "config.json": load_model,
    "generation_config.json": load_model,
    "model.safetensors": load_model,
    "model.safetensors.index.json": load_model,
    "tokenizer.json": text_side,
    "tokenizer.model": text_side,
    "tokenizer_config.json": text_side,
    "special_tokens_map.json": text_side,
    "chat_template.jinja": text_side,
}


@pytest.mark.parametrize("name", list(POINTERS))
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    if name == "model.safetensors.index.json":
        (tmp_path / "model.safetensors").unlink()
    if name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*`git lfs pull`") as caught:
        POINTERS[name](tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_tiktoken_file_is_called_one(tmp_path: Path) -> None:
    lines = [b"IQ== 0", b"Ig== 1", b"Iw== 2", b"IHRoZQ== 3"]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(CheckpointError, match=r"is a tiktoken vocabulary.*tokenizer\.json") as caught:
        load_text_side(tmp_path)
    assert "fetch it again" not in str(caught.value)


def test_a_float64_checkpoint_is_not_called_quantised(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors[HEAD] = tensors[HEAD].double()
    message = refusal(write(tmp_path, tensors=tensors))
    assert "lm_head.weight is F64, supported are F32, F16, BF16" in message
    assert "quantised" not in message
