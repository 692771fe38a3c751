"""No key of a configuration is dropped in silence: transformers' reading of it, or a refusal by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from nudging.errors import CheckpointError
from nudging.models.decoder import Decoder
from nudging.models.loader import load_model
from nudging.models.registry import read_config
from tests.support.checkpoints import write
from tests.support.hf_models import SHAPE, YARN, build_hf, exact_logits, random_ids
from tests.support.hf_models import Case as Tiny

TOLERANCE = 1e-4
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo", "olmo2", "phi3")
VOCAB, LAYERS, COUNT = 61, SHAPE["num_hidden_layers"], 40
GEMMA = {"query_pre_attn_scalar": 20, "sliding_window": 9}
BASE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 9},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {"sliding_window": 9},
}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = [SLIDING, FULL, SLIDING]
NTK = {"rope_type": "dynamic", "factor": 2.0}
WINDOW_ON = {"sliding_window": 5, "use_sliding_window": True, "layer_types": None}
# Keys that change what some model computes, added to a configuration that transformers has written.
CHANGES: dict[str, dict[str, Any]] = {
    "mixed layers": {"layer_types": MIXED},
    "full layers": {"layer_types": [FULL] * LAYERS},
    "sliding layers": {"layer_types": [SLIDING] * LAYERS},
    "mixed layers, window": {"layer_types": MIXED, "sliding_window": 5},
    "mixed layers, window on": {"layer_types": MIXED, "sliding_window": 5, "use_sliding_window": True},
    "unknown layers": {"layer_types": ["chunked_attention"] * LAYERS},
    "window": {"sliding_window": 5},
    "window of 1": {"sliding_window": 1},
    "window below 0": {"sliding_window": -1},
    "wide window": {"sliding_window": 4096},
    "no window": {"sliding_window": None},
    "window on": {**WINDOW_ON, "max_window_layers": 1},
    "window on, high": WINDOW_ON,
    "window off": {"sliding_window": 5, "use_sliding_window": False},
    "window of another name": {"sliding_window_size": 5},
    "pattern": {"sliding_window_pattern": 2, "layer_types": None},
    "private pattern": {"_sliding_window_pattern": 2, "layer_types": None},
    "scaling beside parameters": {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
    "scaling with another name": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "scaling that changes with length": {"rope_scaling": NTK},
    "outer theta": {"rope_theta": 77.0},
    "local theta": {"rope_local_base_freq": 55.0},
    "partial": {"partial_rotary_factor": 0.5},
    "interleaved": {"rope_interleaved": True},
    "layers without rope": {"no_rope_layers": [1, 0, 1]},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 9.0, "factor": 2.0}},
    "nested rope": {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 7.0}}},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "other biases": {"use_bias": True, "qkv_bias": True},
    "head bias": {"lm_head_bias": True},
    "act": {"hidden_act": "gelu_new"},
    "activation": {"hidden_activation": "gelu"},
    "no act": {"hidden_act": "relu6"},
    "scalar": {"query_pre_attn_scalar": 11},
    "logit cap": {"final_logit_softcapping": 1.5},
    "attention cap": {"attn_logit_softcapping": 0.7},
    "logit scale": {"logits_scaling": 8.0},
    "logit scale, Cohere": {"logit_scale": 0.25},
    "multipliers": {"embedding_multiplier": 3.0},
    "residual multiplier": {"residual_multiplier": 0.2},
    "attention multiplier": {"attention_multiplier": 0.1},
    "clip": {"clip_qkv": 0.2},
    "normed heads": {"use_qk_norm": True},
    "normed heads, Phi": {"qk_layernorm": True},
    "epsilon": {"rms_norm_eps": 0.3},
    "other epsilon": {"layer_norm_eps": 0.3},
    "bidirectional": {"use_bidirectional_attention": True},
    "not causal": {"is_causal": False},
    "parallel": {"use_parallel_residual": True},
    "heads": {"num_key_value_heads": None},
    "experts": {"num_experts": 4},
    "sinks": {"attention_sinks": 4},
    "a word nobody knows": {"frobnicate": 1},
}  # fmt: skip


HUB = json.loads(Path(__file__).with_name("hub_configs.json").read_text())


@pytest.mark.parametrize("name", list(HUB))
def test_a_whole_configuration_as_published_means_what_transformers_makes_of_it(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    mine, saved = read_config(tmp_path), read_config(tmp_path / "saved")
    assert mine == replace(saved, eos_token_ids=mine.eos_token_ids, bos_token_id=mine.bos_token_id)


def test_the_first_name_of_longrope_means_longrope(tmp_path: Path) -> None:
    config = HUB["microsoft/Phi-3.5-mini-instruct"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    longrope = read_config(tmp_path)
    config = {**config, "rope_scaling": {**config["rope_scaling"], "type": "su"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == longrope
    assert longrope.ropes[0].kind == "longrope"


def make(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as transformers writes it, with weights under which all matters; made once."""
    directory = tmp_path_factory.getbasetemp() / f"made-{family}"
    if not directory.exists():
        changes = {"vocab_size": VOCAB, "head_dim": 20, **BASE.get(family, {})}
        build_hf(Tiny(family, changes), seed=11).save_pretrained(directory)
    return directory


@pytest.fixture(params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint of each family."""
    return make(request.param, tmp_path_factory)


def with_changes(directory: Path, target: Path, changes: dict[str, Any]) -> Path:
    """The checkpoint with a changed configuration."""
    values = json.loads((directory / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    weights = target / "model.safetensors"
    weights.unlink(missing_ok=True)
    weights.hardlink_to(directory / "model.safetensors")
    return target


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_key_is_read_as_in_transformers_or_refused_by_name(
    written: Path, tmp_path: Path, name: str
) -> None:
    changes = CHANGES[name]
    decoder = loaded(with_changes(written, tmp_path, changes))
    if isinstance(decoder, str):
        assert str(tmp_path) in decoder
        others = ("use_sliding_window", ".bias", "config.json makes it", "rope type")
        assert any(key in decoder for key in (*changes, *others))
        return
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = random_ids(VOCAB, COUNT, seed=3)
    assert (decoder.logits(ids) - exact_logits(hf, ids)).abs().max() <= TOLERANCE


YARN_0 = {**YARN, "mscale": 0, "mscale_all_dim": 0.0, "beta_fast": 0, "beta_slow": 0}
# What transformers takes without a word, and so does this engine.
LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed layers": ("mistral", {"layer_types": MIXED}),
    "full layers": ("mistral", {"layer_types": [FULL] * LAYERS}),
    "layers beside another window": ("mistral", {"layer_types": MIXED, "sliding_window": 3}),
    "scaling beside parameters": ("qwen2", CHANGES["scaling beside parameters"]),
    "scaling beside nested parameters": (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "scaling within nested parameters": (
        "gemma3_text",
        {
            "rope_parameters": {FULL: {k: v for k, v in YARN.items() if k != "rope_theta"}},
            "original_max_position_embeddings": 64,
        },
    ),
    "window of 0 that is off": ("qwen2", {"sliding_window": 0}),
    "weights of 0": ("llama", {"rope_parameters": YARN_0}),
    "proportional": ("llama", CHANGES["proportional"]),
    "proportional, in part": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "proportional",
                "rope_theta": 90.0,
                "partial_rotary_factor": 0.35,
            }
        },
    ),
    **{
        f"act {name}": ("llama", {"hidden_act": name})
        for name in ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_accurate")
    },
    "bos outside": ("llama", {"bos_token_id": VOCAB}),
    "bos below": ("gemma2", {"bos_token_id": -1}),
    "head dim left to the sizes": ("llama", {"head_dim": 20, "pretraining_tp": 2, "pad_token_id": None}),
}


@pytest.mark.parametrize("name", list(LOADED))
def test_what_transformers_loads_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str
) -> None:
    family, changes = LOADED[name]
    directory = make(family, tmp_path_factory)
    decoder = load_model(with_changes(directory, tmp_path, changes))
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = random_ids(VOCAB, COUNT, seed=3)
    assert (decoder.logits(ids) - exact_logits(hf, ids)).abs().max() <= TOLERANCE


def test_a_scaling_added_by_hand_keeps_the_theta_it_stands_beside(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    directory = make("qwen2", tmp_path_factory)
    both = {"rope_type": "default", "rope_theta": 500.0}, {"type": "yarn", "factor": 4.0}
    decoder = load_model(
        with_changes(directory, tmp_path, {"rope_parameters": both[0], "rope_scaling": both[1]})
    )
    one = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 128}
    (tmp_path / "one").mkdir()
    with_changes(directory, tmp_path / "one", {"rope_parameters": one})
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", attn_implementation="eager")
    ids = random_ids(VOCAB, COUNT, seed=3)
    assert (decoder.logits(ids) - exact_logits(hf.eval(), ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("top", "text", "key"),
    [
        ({"frobnicate": 1}, {}, "frobnicate"),
        ({}, {"frobnicate": 1}, "text_config: frobnicate"),
        ({}, {"layer_types": [SLIDING]}, "text_config: layer_types"),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "rope_scaling"),
        ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({}, {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_both_parts_of_a_multimodal_configuration_are_held_to_this(
    tmp_path: Path, top: dict[str, Any], text: dict[str, Any], key: str
) -> None:
    whole = HUB["google/gemma-3-4b-it"]
    whole = {**whole, **top, "text_config": {**whole["text_config"], **text}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=key):
        read_config(tmp_path)


def test_the_upper_part_says_whether_a_multimodal_head_is_tied(tmp_path: Path) -> None:
    whole = {**HUB["google/gemma-3-4b-it"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert not read_config(tmp_path).tied


@pytest.mark.parametrize(
    ("new", "old", "key"),
    [
        ({"attention_factor": 1.3}, {}, "attention_factor = 1.3"),
        ({}, {"beta_fast": 8}, "beta_fast"),
        ({}, {"factor": 2.0}, "factor = 4.0"),
        ({}, {"type": "linear"}, "rope_type = 'yarn'"),
        ({}, {"rope_theta": 5.0}, "rope_theta"),
    ],
)
def test_two_scalings_that_differ_are_refused(
    tmp_path: Path, new: dict[str, Any], old: dict[str, Any], key: str
) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    parameters = {
        "rope_parameters": {**scaling, **new, "rope_theta": 9.0},
        "rope_scaling": {**scaling, **old},
    }
    with pytest.raises(CheckpointError, match=key):
        read_config(write(tmp_path, {**parameters, "rope_theta": None}))


def test_a_scaling_that_is_written_twice_counts_once(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    parameters = {"rope_theta": 9.0, "rope_parameters": {**scaling, "rope_theta": 9.0}}
    once = read_config(write(tmp_path, parameters))
    assert read_config(write(tmp_path, {**parameters, "rope_scaling": scaling})) == once


def test_no_window_may_be_written_as_0(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    for family in ("mistral", "phi3"):
        directory = make(family, tmp_path_factory)
        assert read_config(with_changes(directory, tmp_path, {"sliding_window": 0})).windows == (0,) * LAYERS


def test_a_bos_outside_the_vocabulary_is_none(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, {"bos_token_id": 19})).bos_token_id is None
    assert read_config(write(tmp_path, {"bos_token_id": 18})).bos_token_id == 18


def loaded(directory: Path) -> Decoder | str:
    """The checkpoint, or why it is refused."""
    try:
        return load_model(directory)
    except CheckpointError as error:
        return str(error)
