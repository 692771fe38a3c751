"""A configuration means what its publisher meant, or is refused by file, key and value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nudging.errors import BadRequest, CheckpointError
from nudging.models.registry import ModelConfig, read_config
from nudging.models.tensors import layer_shapes
from tests.support.checkpoints import CONFIG, VOCAB, write

# Parameters as their publishers count them, the 3.88 billion of Gemma 3 4B with 64 rows of padding.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "olmo-1b": 1_176_764_416,
    "olmo-2-7b": 7_298_617_344,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
}


@pytest.fixture(params=list(PUBLISHED))
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ModelConfig]:
    """The name of a published model, and what its configuration as published is read as."""
    configs = json.loads(Path(__file__).with_name("published_configs.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(configs[request.param]))
    return request.param, read_config(tmp_path)


def test_published_configurations_describe_as_many_parameters_as_published(
    published: tuple[str, ModelConfig],
) -> None:
    name, config = published
    layer = sum(sum(rows) * math.prod(rest) for rows, rest in layer_shapes(config).values())
    table = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    norm = config.hidden_size if config.norm == "rms" else 0
    assert config.num_layers * layer + table + norm == PUBLISHED[name]


# Context, and the layers with a sliding window of which size.
PUBLISHED_CONTEXTS = {
    "llama-3.1-8b": (131072, 0, 0),
    "llama-2-7b": (4096, 0, 0),
    "mistral-7b-v0.1": (32768, 32, 4096),
    "qwen2.5-0.5b": (32768, 0, 0),
    "qwen3-0.6b": (40960, 0, 0),
    "gemma-2-2b": (8192, 13, 4096),
    "gemma-3-1b": (32768, 22, 512),
    "gemma-3-4b": (131072, 29, 1024),
    "olmo-1b": (2048, 0, 0),
    "olmo-2-7b": (4096, 0, 0),
    "phi-3.5-mini": (4096, 32, 262144),
    "phi-4-mini": (4096, 32, 262144),
}


def test_published_configurations_have_the_contexts_and_windows_published(
    published: tuple[str, ModelConfig],
) -> None:
    name, config = published
    sliding = [window for window in config.windows if window]
    assert (config.max_len, len(sliding), max(sliding, default=0)) == PUBLISHED_CONTEXTS[name]


def refusal(directory: Path) -> str:
    """The message of the CheckpointError that reading the directory's configuration raises."""
    with pytest.raises(CheckpointError) as caught:
        read_config(directory)
    return str(caught.value)


WRONG_VALUES = [
    ("hidden_size", -1),
    ("hidden_size", 0),
    ("hidden_size", "48"),
    ("hidden_size", True),
    ("hidden_size", 48.0),
    ("hidden_size", 2**70),
    ("vocab_size", 2**40),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", None),
    ("num_key_value_heads", 2),
    ("num_key_value_heads", 5),
    ("intermediate_size", []),
    ("max_position_embeddings", 0),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", 10**400),
    ("rope_theta", float("inf")),
    ("rope_theta", 0),
    ("rope_scaling", 3),
    ("hidden_act", "relu"),
    ("hidden_act", 1),
    ("tie_word_embeddings", "yes"),
    ("attention_bias", 1),
    ("eos_token_id", VOCAB),
    ("eos_token_id", [2, -1]),
    ("eos_token_id", "</s>"),
    ("torch_dtype", 16),
    ("text_config", []),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES)
def test_a_wrong_value_is_refused_by_file_key_and_value(tmp_path: Path, key: str, value: object) -> None:
    message = refusal(write(tmp_path, {key: value}))
    assert message.startswith(str(tmp_path / "config.json"))
    assert f"{key} = {value!r}"[:60] in message
    assert "correct the file" in message


WRONG_ROPES = [
    ({"type": "spiral", "factor": 2.0}, "'spiral' is not supported; supported: default, linear"),
    ({"type": "linear"}, "factor is missing"),
    ({"type": "linear", "factor": -2}, "factor = -2"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
    (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        "high_freq_factor = 4.0, it must be above low_freq_factor = 4",
    ),
    ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": -8}, "-8"),
    ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 1.0]}, "a list of 2 numbers"),
    ({"type": "longrope", "short_factor": [1.0, 0], "long_factor": [1.0, 1.0]}, "positive"),
    ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
]


@pytest.mark.parametrize(("scaling", "fragment"), WRONG_ROPES)
def test_a_wrong_rope_scaling_is_refused(tmp_path: Path, scaling: dict[str, Any], fragment: str) -> None:
    assert fragment in refusal(write(tmp_path, {"rope_scaling": scaling}))


def test_an_odd_head_dim_is_refused(tmp_path: Path) -> None:
    assert "head_dim 5 gives 5 rotary channels" in refusal(write(tmp_path, {"head_dim": 5}))


def test_an_unknown_family_is_refused_with_the_list_of_known_ones(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, {"model_type": "mamba"}))
    assert "model_type 'mamba'" in message
    assert "llama, mistral, qwen2, qwen3, gemma2, gemma3, gemma3_text, olmo, olmo2, phi3" in message


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    assert "quantised" in refusal(write(tmp_path, {"quantization_config": {"bits": 4}}))


def test_layers_that_slide_need_a_window(tmp_path: Path) -> None:
    layers = ["full_attention", "sliding_attention"]
    changes: dict[str, Any] = {"model_type": "qwen2", "layer_types": layers}
    assert "use_sliding_window is missing, it must be true" in refusal(write(tmp_path, changes))
    changes |= {"use_sliding_window": True, "sliding_window": None}
    assert "sliding_window = None, it must be an integer above 0" in refusal(write(tmp_path, changes))
    changes["layer_types"] = ["full_attention"]
    assert "a list of 2 times one of" in refusal(write(tmp_path, changes))


BAD_FILES = [
    (b"{hidden_size: 12}", "is not JSON"),
    (b'{"model_type": "\xff"}', "is not JSON: 'utf-8' codec"),
    (b"[1, 2]", "holds a JSON list"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"model_type": "llama", "model_type": "qwen2"}', "a key occurs twice"),
    (b" " * (17 << 20), "has 17825792 bytes, the limit is 16777216"),
    (b"", "is not JSON"),
]


@pytest.mark.parametrize(("content", "fragment"), BAD_FILES, ids=[fragment for _, fragment in BAD_FILES])
def test_a_damaged_configuration_is_refused_by_name(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / "config.json") in message
    assert fragment in message


def test_a_missing_directory_or_configuration_is_refused_by_name(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'} is not a directory" in refusal(tmp_path / "none")
    assert f"cannot read {tmp_path / 'config.json'}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, 2, (2,)), (None, [2, 5], (2, 5)), (7, 2, (7,)), ([7, 8], 2, (7, 8)), (None, None, ())],
)
def test_eos_ids_are_those_of_the_generation_config_before_those_of_the_config(
    tmp_path: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    write(tmp_path, {"eos_token_id": config})
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("max_len", [0, 33, True, 2.0])
def test_a_context_the_checkpoint_cannot_serve_is_refused(tmp_path: Path, max_len: Any) -> None:
    with pytest.raises(BadRequest, match="is not from 1 to 32"):
        read_config(write(tmp_path), max_len=max_len)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(family=st.sampled_from(["llama", "qwen2", "gemma2", "gemma3", "phi3", "olmo"]), changes=st.data())
def test_arbitrary_configuration_values_give_a_description_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, family: str, changes: st.DataObject
) -> None:
    keys = [*CONFIG, "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "text_config"]
    values = {key: changes.draw(JSON) for key in changes.draw(st.lists(st.sampled_from(keys), max_size=3))}
    directory = tmp_path_factory.getbasetemp()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **values, "model_type": family}))
    try:
        config = read_config(directory)
    except CheckpointError:
        return
    assert len(config.windows) == len(config.ropes) == config.num_layers
