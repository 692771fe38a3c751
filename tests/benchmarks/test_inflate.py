"""A small checkpoint in the body of a large one costs what the large one costs and writes what it wrote."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.inflate import NOISE, SHAPES, Layout, inflate, inflate_checkpoint, inflate_model, shape
from nudging import LLM, BadRequest, LoadedModel, Nudging, SamplingParams, pocket
from nudging.kernels.weight import parts_of
from nudging.models.loader import load_model
from nudging.pocket.grade import load_questions
from tests.support.tiny import write_tiny_checkpoint

# fp32 adds the same products in another order: logits of about 10 move by some ulps of 1e-6, and noise of
# 1e-12 by nothing that fp32 can hold beside them.
LOGIT_ULPS = 1e-6 * 10
TOLERANCE = 2 * LOGIT_ULPS

# name -> target, from pocket:base (hidden 192, 6 layers, 6/2 heads of 32, inner 512, vocabulary 2048)
TARGETS: dict[str, dict[str, Any]] = {
    "wider, deeper, tied": shape(384, 8, 12, 4, 1024, 5000),
    "untied, heads twice as large": shape(320, 7, 10, 2, 600, 4000, tied=False) | {"head_dim": 64},
    "every query head with its own key": shape(256, 6, 8, 8, 512, 2100),
    "qwen2 with its biases": shape(448, 8, 14, 2, 768, 3000) | {"model_type": "qwen2"},
    "a llama with biases": shape(256, 6, 8, 4, 512, 2048, tied=False) | {"attention_bias": True},
    "mistral": shape(384, 7, 6, 2, 512, 2048) | {"model_type": "mistral", "sliding_window": 4},
}


def texts(count: int) -> list[list[int]]:
    """Questions in the guide's form, as ids."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.path("base"))
    lines = [f"User: {q.question}\nAssistant: The answer is {q.answer}." for q in load_questions()[:count]]
    return [tokenizer(line)["input_ids"] for line in lines]


@pytest.mark.parametrize("name", TARGETS)
def test_the_inflated_model_says_what_the_small_one_says(tmp_path: Path, name: str) -> None:
    inflate_checkpoint(pocket.path("base"), tmp_path, TARGETS[name], torch.float32, shard_bytes=1 << 21)
    small, large = load_model(pocket.path("base"), torch.float32), load_model(tmp_path)
    vocab = small.config.vocab_size
    for ids in [*texts(12), list(range(0, vocab, 9))]:
        expected, found = small.logits(ids).double().softmax(-1), large.logits(ids).double().softmax(-1)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        assert (found[:, :vocab] - expected).abs().max() <= TOLERANCE
        assert found[:, vocab:].sum() < 1e-30, "added words are never likely"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wider, deeper, tied", "qwen2 with its biases"])
def test_a_model_made_in_memory_is_the_one_on_disk(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = pocket.path("base")
    inflate_checkpoint(source, tmp_path / "disk", TARGETS[name], dtype)
    disk = load_model(tmp_path / "disk")
    made = inflate_model(source, tmp_path / "memory", TARGETS[name], dtype).decoder
    assert not list((tmp_path / "memory").glob("*.safetensors*"))
    assert made.config == disk.config
    for one, other in zip(made.weights.distinct(), disk.weights.distinct(), strict=True):
        assert torch.equal(parts_of(one)[0], parts_of(other)[0])
        assert parts_of(one)[0].dtype == dtype


def test_engines_share_a_loaded_model_and_its_text_is_the_files(tmp_path: Path) -> None:
    params, prompt = SamplingParams(max_tokens=12, ignore_eos=True), "Question: what is 2 + 3?\nAnswer:"
    base = inflate_model(pocket.path("base"), tmp_path, TARGETS["wider, deeper, tied"])
    guide = LoadedModel.load("pocket:guide", dtype="bfloat16")
    with LLM(base, guide, kv_cache_memory="8MiB") as one, LLM(base, base, kv_cache_memory="8MiB") as two:
        runners = [*one._engine.runners.values(), *two._engine.runners.values()]
        assert [runner.decoder for runner in runners] == [base.decoder, guide.decoder, base.decoder]
        text = one.generate(prompt, params, Nudging(0.4, "token"))[0].outputs[0].token_ids
        assert two.generate(prompt, params)[0].outputs[0].token_ids
    # The models outlive the engines that were closed.
    inflate_checkpoint(pocket.path("base"), tmp_path / "disk", TARGETS["wider, deeper, tied"])
    with LLM(tmp_path / "disk", guide, kv_cache_memory="8MiB") as three:
        assert three.generate(prompt, params, Nudging(0.4, "token"))[0].outputs[0].token_ids == text


def test_an_engine_that_a_loaded_model_cannot_be_says_so() -> None:
    model = LoadedModel.load("pocket:guide", dtype="float32", max_len=64)
    with LLM(model, dtype="float32", max_len=64, kv_cache_memory="8MiB") as llm:
        assert llm.roles["base"].max_len == 64
    for options in ({"dtype": "bfloat16"}, {"quantization": "int8"}, {"max_len": 32}):
        with pytest.raises(BadRequest, match=r"LoadedModel\.load"):
            LLM(model, kv_cache_memory="8MiB", **options)
    with pytest.raises(BadRequest, match="a loaded model is on cpu"):
        model.check("auto", torch.device("cuda"), None, None)


def test_transformers_reads_it_the_same(tmp_path: Path) -> None:
    target = TARGETS["qwen2 with its biases"]
    inflate_checkpoint(pocket.path("base"), tmp_path, target, torch.float32)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (pocket.path("base"), tmp_path)
    ]
    ids = torch.tensor([texts(1)[0]])
    with torch.no_grad():
        small, large = (model(ids).logits.double().softmax(-1) for model in models)
    assert torch.equal(small.argmax(-1), large.argmax(-1))
    assert (large[..., :2048] - small).abs().max() <= TOLERANCE


def test_a_random_untied_llama_is_preserved_too(tmp_path: Path) -> None:
    """As transformers writes it, with the rotary embedding under `rope_parameters`."""
    source = write_tiny_checkpoint(tmp_path / "small", seed=3)
    inflate_checkpoint(source, tmp_path / "large", shape(96, 3, 8, 2, 128, 400, tied=False), torch.float32)
    small, large = load_model(source), load_model(tmp_path / "large")
    ids = torch.randint(0, 320, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, found = small.logits(ids).double().softmax(-1), large.logits(ids).double().softmax(-1)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found[:, :320] - expected).abs().max() <= TOLERANCE


def test_no_weight_is_zero_and_what_is_added_is_tiny() -> None:
    source = pocket.path("guide")
    config = json.loads((source / "config.json").read_text())
    state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        tensors, _ = inflate(state, config, TARGETS["wider, deeper, tied"], dtype)
        added = [t for name, t in tensors.items() if "layers.7." in name and t.ndim == 2]
        assert all(0 < t.float().abs().max() < 10 * NOISE for t in added)
        kept = sum(int((t == 0).sum()) for t in state.values())
        assert sum(int((t == 0).sum()) for t in tensors.values()) <= kept


def test_bf16_nudges_and_agrees_as_often_as_the_pocket_pair(tmp_path: Path) -> None:
    """bf16 rounds differently where sizes differ; the rates that speed depends on stay within 2 points."""
    pair = {"base": pocket.path("base"), "guide": pocket.path("guide")}
    large = {name: tmp_path / name for name in pair}
    for name, target in (
        ("base", shape(384, 8, 12, 4, 1024, 5000)),
        ("guide", shape(224, 4, 7, 1, 320, 5000)),
    ):
        inflate_checkpoint(pair[name], large[name], target)
    prompts = [f"Question: {q.question}\nAnswer:" for q in load_questions()[:48]]
    with LLM(**pair, kv_cache_memory="64MiB") as llm:
        results = llm.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True), Nudging(0.4))
        ids = [llm.roles["base"].tokenizer.encode(p) for p in prompts]
    written = [a + list(r.outputs[0].token_ids) for a, r in zip(ids, results, strict=True)]
    (nudges, agrees), (new_nudges, new_agrees) = rates(pair, written), rates(large, written)
    assert 0.02 < nudges < 0.9, "there is something to compare"
    assert abs(new_nudges - nudges) <= 0.02
    assert abs(new_agrees - agrees) <= 0.02


def rates(pair: dict[str, Path], written: list[list[int]]) -> tuple[float, float]:
    """How often the base is unsure, and how often the guide agrees where it is sure, along given texts."""
    base, guide = load_model(pair["base"]), load_model(pair["guide"])
    unsure, same = [], []
    for ids in written:
        prob, token = base.logits(ids).softmax(-1).max(-1)
        unsure += (prob < 0.4).tolist()
        same += (guide.logits(ids).argmax(-1) == token)[prob >= 0.4].tolist()
    return sum(unsure) / len(unsure), sum(same) / len(same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 160}, "hidden is 160"),
        ({"num_hidden_layers": 2}, "layers is 2"),
        ({"head_dim": 48}, "multiple of 32"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32}, None),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}, "key heads"),
        ({"hidden_size": 192, "head_dim": 32}, "free channel"),
        ({"model_type": "qwen3"}, "qwen3"),
    ],
)
def test_a_target_that_cannot_hold_the_source_is_refused(change: dict[str, Any], message: str | None) -> None:
    config = json.loads((pocket.path("base") / "config.json").read_text())
    target = TARGETS["wider, deeper, tied"] | change
    state = AutoModelForCausalLM.from_pretrained(pocket.path("base"), dtype=torch.float32).state_dict()
    if message is None:
        inflate(state, config, target)
    else:
        with pytest.raises(BadRequest, match=message):
            inflate(state, config, target)


def test_a_tied_target_and_fp16_are_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "small")
    with pytest.raises(BadRequest, match="tie_word_embeddings"):
        inflate_checkpoint(source, tmp_path / "large", shape(96, 3, 8, 2, 128, 400))
    with pytest.raises(BadRequest, match="float16"):
        inflate_checkpoint(
            source, tmp_path / "large", shape(96, 3, 8, 2, 128, 400, tied=False), torch.float16
        )


def test_named_shapes_have_their_names_size() -> None:
    sizes = {
        "10m": 10e6,
        "100m": 100e6,
        "llama-3.1-8b": 8.0e9,
        "llama-3.2-1b": 1.24e9,
        "qwen2.5-0.5b": 0.49e9,
        "qwen2.5-7b": 7.6e9,
    }
    for name, expected in sizes.items():
        s = Layout.of(SHAPES[name])
        attention = 2 * s.hidden * s.head_dim * (s.heads + s.kv_heads)
        layers = s.layers * (attention + 3 * s.hidden * s.inner)
        assert layers + s.vocab * s.hidden * (2 - s.tied) == pytest.approx(expected, rel=0.05)


def test_the_command_writes_a_checkpoint_that_talks(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TARGETS["qwen2 with its biases"]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.inflate", "pocket:guide", str(out), "--config", str(config)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    with LLM(base=out, kv_cache_memory="16MiB") as llm:
        message = [{"role": "user", "content": load_questions()[2].question}]
        text = llm.chat(message, SamplingParams(max_tokens=8))[0].outputs[0].text
    assert text
