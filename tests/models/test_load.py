"""A checkpoint directory is untrusted: what is wrong is said exactly, and nothing in it is executed."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nudging.errors import BadRequest, CheckpointError
from nudging.models.checkpoint import read_header
from nudging.models.loader import load_model
from tests.support.checkpoints import HIDDEN, VOCAB, make_tensors, write


def write_shards(directory: Path) -> dict[str, str]:
    """A checkpoint in two shards; its weight map."""
    write(directory)
    (directory / "model.safetensors").unlink()
    items = list(make_tensors().items())
    weight_map = {}
    for file, part in (("a.safetensors", items[:7]), ("b.safetensors", items[7:])):
        save_file(dict(part), directory / file)
        weight_map |= {name: file for name, _ in part}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_header(directory: Path, edit: Any) -> None:
    """Rewrite the JSON header by `edit(header)`, the data staying as it is."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def refusal(directory: Path, **options: Any) -> str:
    """The message of the CheckpointError that loading the directory raises."""
    with pytest.raises(CheckpointError) as caught:
        load_model(directory, **options)
    return str(caught.value)


def test_a_sound_checkpoint_loads_with_a_bar_on_stderr_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = load_model(write(tmp_path), progress=True)
    assert decoder.logits([1, 2, 3]).isfinite().all()
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading" in err
    load_model(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_dtype_that_cannot_be_computed_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"torch\.int8.*float32, bfloat16, float16"):
        load_model(write(tmp_path), dtype=torch.int8)


def test_missing_tensors_are_counted_and_named(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    message = refusal(write(tmp_path, tensors=tensors))
    assert "2 of 21 tensors are missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "lm_head.weight" in message


def test_unexpected_tensors_are_counted_and_some_named(tmp_path: Path) -> None:
    extra = {f"model.layers.0.adapter.{i}": torch.zeros(1) for i in range(9)}
    message = refusal(write(tmp_path, tensors={**make_tensors(), **extra}))
    assert "9 tensors are not known" in message
    assert "model.layers.0.adapter.0" in message
    assert "and 4 more" in message


def test_control_characters_of_a_tensor_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, tensors={**make_tensors(), "evil\x1b[2J": torch.zeros(1)}))
    assert "evil\\x1b[2J" in message
    assert message.isprintable()


def test_stored_rotary_frequencies_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    with_them = load_model(write(tmp_path, tensors={**make_tensors(), **old})).logits([1, 2])
    assert torch.equal(with_them, load_model(write(tmp_path)).logits([1, 2]))


@pytest.mark.parametrize("name", list(make_tensors()))
def test_a_wrong_shape_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = make_tensors()
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])
    message = refusal(write(tmp_path, tensors=tensors))
    assert f"{name} has shape {list(tensors[name].shape)}, config.json makes it" in message


def test_an_embedding_of_other_rows_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    assert "(config.json's vocab_size is 23)" in refusal(write(tmp_path, {"vocab_size": 23}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", list(make_tensors()))
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    tensors = make_tensors()
    tensors[name].view(-1)[-1] = value
    assert f"{name} has 1 values that are NaN or infinite" in refusal(write(tmp_path, tensors=tensors))


def test_weights_whose_sum_overflows_are_not_mistaken_for_infinite(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["model.norm.weight"].fill_(3e38)
    load_model(write(tmp_path, tensors=tensors))


def test_weights_too_large_for_float16_are_refused_by_name(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["model.norm.weight"][3] = 1e5
    write(tmp_path, tensors=tensors)
    message = refusal(tmp_path, dtype=torch.float16)
    assert "model.norm.weight has 1 values that are NaN or infinite in torch.float16" in message
    load_model(tmp_path, dtype=torch.bfloat16)


def test_integer_weights_are_refused_by_name_and_dtype(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)
    assert "lm_head.weight is I8, supported are F32, F16, BF16" in refusal(write(tmp_path, tensors=tensors))


def test_the_head_of_a_tied_checkpoint_has_to_be_its_embedding(tmp_path: Path) -> None:
    tensors = make_tensors()
    message = refusal(write(tmp_path, {"tie_word_embeddings": True}, tensors))
    assert "lm_head.weight is not the embedding" in message
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    decoder = load_model(write(tmp_path, {"tie_word_embeddings": True}, tensors))
    assert decoder.weights.head is decoder.weights.embed


@pytest.mark.parametrize("kind", ["missing shard", "elsewhere", "not in it", "in the other", "no map"])
def test_a_damaged_index_is_refused(tmp_path: Path, kind: str) -> None:
    weight_map = write_shards(tmp_path)
    load_model(tmp_path)
    if kind == "missing shard":
        (tmp_path / "b.safetensors").unlink()
        assert "1 of 2 shards are missing: b.safetensors" in refusal(tmp_path)
    elif kind == "elsewhere":
        outside = tmp_path.parent / "outside.safetensors"
        shutil.copy(tmp_path / "b.safetensors", outside)
        write_index(tmp_path, {k: v.replace("b.", "../outside.") for k, v in weight_map.items()})
        assert "'../outside.safetensors', it must be a .safetensors file of this directory" in refusal(
            tmp_path
        )
    elif kind == "not in it":
        write_index(tmp_path, {**weight_map, "model.norm.bias": "a.safetensors"})
        assert "places model.norm.bias in a.safetensors, which does not have it" in refusal(tmp_path)
    elif kind == "in the other":
        write_index(tmp_path, {**weight_map, "lm_head.weight": "b.safetensors"})
        assert "places lm_head.weight in b.safetensors, which does not have it" in refusal(tmp_path)
    else:
        write_index(tmp_path, {})
        assert "weight_map = {}" in refusal(tmp_path)


def test_no_weights_at_all_are_refused_by_the_names_looked_for(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path, file: str) -> None:
    marker = tmp_path / "exploded"
    (write(tmp_path) / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(pickle.dumps(Bomb(marker)))
    message = refusal(tmp_path)
    assert f"has {file} but no model.safetensors" in message
    assert "save_pretrained" in message
    assert not marker.exists()


def test_code_of_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "exploded"
    auto_map = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    write(tmp_path, {"auto_map": auto_map, "trust_remote_code": True})
    for file in ("configuration_evil.py", "modeling_evil.py", "__init__.py", "conftest.py", "safetensors.py"):
        (tmp_path / file).write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    load_model(tmp_path).logits([1])
    assert not marker.exists()
    assert not [m for m in set(sys.modules) - before if "evil" in m]


# ------------------------------------------------------------------------------------------------ headers


def set_entry(name: str, key: str, value: Any) -> Any:
    return lambda header: header[name].update({key: value})


NORM = "model.norm.weight"
HEADER_EDITS = [
    (set_entry(NORM, "dtype", "F7"), "dtype = 'F7'"),
    (set_entry(NORM, "dtype", None), "dtype = None"),
    (set_entry(NORM, "dtype", "F16"), "24 bytes apart"),
    (set_entry(NORM, "shape", [-12]), "shape = [-12]"),
    (set_entry(NORM, "shape", [2**49, 2**49]), "bytes apart"),
    (set_entry(NORM, "shape", [12.0]), "shape = [12.0]"),
    (set_entry(NORM, "shape", [1] * 9), "at most 8"),
    (set_entry(NORM, "shape", "12"), "shape = '12'"),
    (set_entry(NORM, "data_offsets", [8, 0]), "data_offsets = [8, 0]"),
    (set_entry(NORM, "data_offsets", [0, 48]), "begins at byte"),
    (set_entry(NORM, "data_offsets", [10**9, 10**9 + 48]), "begins at byte"),
    (set_entry(NORM, "data_offsets", [0]), "data_offsets = [0]"),
    (lambda header: header.update({NORM: []}), f"{NORM} = []"),
    (lambda header: header.clear(), "has 0 tensors"),
    (lambda header: header.pop("model.embed_tokens.weight"), "begins at byte"),
    (lambda header: header.update({"__metadata__": 3}), "invalid type"),
]


@pytest.mark.parametrize(("edit", "fragment"), HEADER_EDITS)
def test_a_wrong_header_is_refused_by_file_and_value(tmp_path: Path, edit: Any, fragment: str) -> None:
    edit_header(write(tmp_path), edit)
    message = refusal(tmp_path)
    assert str(tmp_path / "model.safetensors") in message
    assert fragment in message


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "truncated" in refusal(tmp_path)
    path.write_bytes(data + b"\0")
    assert "header needs" in refusal(tmp_path)


def test_a_header_beyond_the_size_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    with path.open("r+b") as file:
        file.write((1 << 25).to_bytes(8, "little"))
        file.truncate(1 << 26)  # sparse: takes no space
    assert "has a header of 33554432 bytes, the limit is 16777216" in refusal(tmp_path)


def test_more_tensors_than_the_limit_are_refused(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(i): empty for i in range(100_001)}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="has 100001 tensors, the limits are 1 and 100000"):
        read_header(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A directory whose weights file a test may overwrite, and that file's sound content."""
    directory = write(tmp_path_factory.mktemp("sound"))
    return directory, (directory / "model.safetensors").read_bytes()


def loads_or_is_refused(directory: Path, data: bytes) -> None:
    """Whatever the file holds, loading it ends in a model or in a CheckpointError."""
    (directory / "model.safetensors").write_bytes(data)
    try:
        decoder = load_model(directory)
    except CheckpointError:
        return
    assert decoder.logits([1, 2]).shape == (2, VOCAB)


EDITS = st.lists(st.tuples(st.integers(0, 2200), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=150)
@given(edits=EDITS)
def test_changed_header_bytes_give_a_model_or_a_typed_error(
    sound: tuple[Path, bytes], edits: list[tuple[int, int]]
) -> None:
    directory, data = sound
    changed = bytearray(data)
    for at, byte in edits:
        changed[at] = byte
    loads_or_is_refused(directory, bytes(changed))


@settings(max_examples=100)
@given(header=st.binary(max_size=200), tail=st.binary(max_size=64))
def test_arbitrary_bytes_give_a_typed_error(sound: tuple[Path, bytes], header: bytes, tail: bytes) -> None:
    loads_or_is_refused(sound[0], header)
    loads_or_is_refused(sound[0], len(header).to_bytes(8, "little") + header + tail)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON})


@settings(max_examples=100)
@given(name=st.sampled_from(list(make_tensors())), entry=JSON | ENTRY, extra=st.text(max_size=5))
def test_arbitrary_header_entries_give_a_typed_error(
    sound: tuple[Path, bytes], name: str, entry: Any, extra: str
) -> None:
    directory, data = sound
    (directory / "model.safetensors").write_bytes(data)
    edit_header(directory, lambda header: header.update({name: entry, extra: entry}))
    loads_or_is_refused(directory, (directory / "model.safetensors").read_bytes())
