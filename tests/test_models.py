"""Every family's logits are transformers' logits: tiny random models with awkward shapes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nudging.batch import Batch, KVCache
from nudging.errors import BadRequest
from nudging.models.config import read_config
from nudging.models.decoder import Decoder
from nudging.models.load import load_model
from nudging.models.rope import rope_tables

NUM_POSITIONS = 64
TOLERANCE = 1e-4  # fp32 logits of standard deviation about 2 after sums in another order
TIE = 1e-5

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "eos_token_id": 3,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16.0, "truncate": False}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.7 * i for i in range(6)],
}
LONG_PARTIAL = {
    **LONG,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 3.0, 5.0],
}


class Case(NamedTuple):
    """A tiny configuration: its family, what differs from SHAPE, and the context to serve."""

    family: str
    changes: dict[str, Any]
    max_len: int | None = None


GEMMA = {"query_pre_attn_scalar": 20, "head_dim": 20}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

CASES = {
    "llama": Case("llama", {"vocab_size": 97, "head_dim": 20}),
    "llama-llama3-biases-tied": Case(
        "llama",
        {
            "vocab_size": 131,
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear-mqa": Case(
        "llama", {"vocab_size": 101, "rope_parameters": LINEAR, "num_key_value_heads": 1, "head_dim": 6}
    ),
    "llama-dynamic": Case("llama", {"vocab_size": 89, "rope_parameters": DYNAMIC}),
    "mistral-window": Case("mistral", {"vocab_size": 103, "sliding_window": 7, "head_dim": 10}),
    "mistral-no-window": Case("mistral", {"vocab_size": 107, "sliding_window": None, "head_dim": 32}),
    "mistral-yarn": Case(
        "mistral",
        {"vocab_size": 83, "sliding_window": 33, "rope_parameters": YARN, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "qwen2": Case("qwen2", {"vocab_size": 109, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2-windows-yarn": Case(
        "qwen2",
        {
            "vocab_size": 79,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": YARN_MSCALE,
        },
    ),
    "qwen2-tied-mha": Case(
        "qwen2", {"vocab_size": 113, "num_key_value_heads": 4, "tie_word_embeddings": True}
    ),
    "qwen3": Case("qwen3", {"vocab_size": 127, "head_dim": 20}),
    "qwen3-biases-linear": Case(
        "qwen3", {"vocab_size": 73, "head_dim": 8, "attention_bias": True, "rope_parameters": LINEAR}
    ),
    "qwen3-tied-windows": Case(
        "qwen3",
        {
            "vocab_size": 71,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "gemma2": Case(
        "gemma2",
        {
            **GEMMA,
            "vocab_size": 137,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2-no-caps-biases": Case(
        "gemma2",
        {
            **GEMMA,
            "vocab_size": 61,
            "sliding_window": 11,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    ),
    "gemma2-scalar-mqa": Case(
        "gemma2",
        {
            "vocab_size": 67,
            "head_dim": 14,
            "query_pre_attn_scalar": 37,
            "num_key_value_heads": 1,
            "sliding_window": 20,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            **GEMMA,
            "vocab_size": 139,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3-linear": Case(
        "gemma3_text",
        {
            **GEMMA,
            "vocab_size": 59,
            "num_hidden_layers": 7,
            "sliding_window": 5,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "gemma3-cap-biases": Case(
        "gemma3_text",
        {
            **GEMMA,
            "vocab_size": 149,
            "sliding_window": 13,
            "attention_bias": True,
            "final_logit_softcapping": 4.0,
            "num_key_value_heads": 4,
        },
    ),
    "olmo": Case("olmo", {"vocab_size": 151}),
    "olmo-clip": Case("olmo", {"vocab_size": 53, "clip_qkv": 0.7, "tie_word_embeddings": True}),
    "olmo-linear-biases": Case(
        "olmo",
        {"vocab_size": 157, "attention_bias": True, "rope_parameters": LINEAR, "num_key_value_heads": 4},
    ),
    "olmo2": Case("olmo2", {"vocab_size": 163}),
    "olmo2-biases-yarn": Case(
        "olmo2", {"vocab_size": 47, "attention_bias": True, "rope_parameters": YARN, "num_key_value_heads": 4}
    ),
    "olmo2-tied-mqa": Case(
        "olmo2", {"vocab_size": 167, "tie_word_embeddings": True, "num_key_value_heads": 1}
    ),
    "phi3-window": Case("phi3", {"vocab_size": 173, "sliding_window": 10}),
    "phi3-longrope": Case(
        "phi3", {"vocab_size": 43, "original_max_position_embeddings": 32, "rope_parameters": LONG}, 128
    ),
    "phi3-partial-tied": Case(
        "phi3",
        {
            "vocab_size": 179,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONG_PARTIAL,
            "tie_word_embeddings": True,
        },
        96,
    ),
}


class Pair(NamedTuple):
    """A checkpoint as transformers runs it and as this engine does."""

    hf: transformers.PreTrainedModel
    decoder: Decoder
    directory: Path


def randomize(model: transformers.PreTrainedModel, seed: int) -> None:
    """Weights under which norms, biases and attention all matter; transformers' own are near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.25 * noise)


def build_hf(case: Case, seed: int) -> transformers.PreTrainedModel:
    """The tiny model of a case, by transformers."""
    changes = json.loads(json.dumps(case.changes))  # transformers writes into the dictionaries it is given
    config = transformers.AutoConfig.for_model(case.family, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model, seed)
    return model


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    hf = build_hf(case, seed=list(CASES).index(request.param))
    directory = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(directory)
    return Pair(hf, load_model(directory, max_len=case.max_len), directory)


def hf_logits(hf: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits [n, vocab] of all positions, without a cache."""
    with torch.no_grad():
        return hf(torch.tensor([ids]), use_cache=False).logits[0].float()


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Ragged:
    """Sequences over one cache of small scattered blocks, with NaN wherever nothing was written."""

    BLOCK_SIZE = 4

    def __init__(self, decoder: Decoder, num_seqs: int, seed: int) -> None:
        config = decoder.config
        per_seq = -(-NUM_POSITIONS // self.BLOCK_SIZE)
        self.decoder = decoder
        self.kv = KVCache(
            config.num_layers,
            num_seqs * per_seq + 3,
            self.BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            decoder.dtype,
            decoder.device,
        )
        self.kv.k.fill_(float("nan"))
        self.kv.v.fill_(float("nan"))
        order = torch.randperm(num_seqs * per_seq + 3, generator=torch.Generator().manual_seed(seed))
        self.blocks = order[: num_seqs * per_seq].view(num_seqs, per_seq)
        self.lengths = [0] * num_seqs

    def step(self, chunks: list[list[int]]) -> list[Tensor]:
        """The logits of each sequence's next tokens."""
        ids, positions, slots, cu, tables = [], [], [], [0], torch.full_like(self.blocks, 2**31 - 1)
        for s, chunk in enumerate(chunks):
            at = torch.arange(self.lengths[s], self.lengths[s] + len(chunk))
            ids += chunk
            positions.append(at)
            slots.append(self.blocks[s, at // self.BLOCK_SIZE] * self.BLOCK_SIZE + at % self.BLOCK_SIZE)
            cu.append(len(ids))
            self.lengths[s] += len(chunk)
            used = -(-self.lengths[s] // self.BLOCK_SIZE)
            tables[s, :used] = self.blocks[s, :used]
        batch = Batch(
            torch.tensor(ids),
            torch.cat(positions),
            torch.cat(slots),
            torch.tensor(cu, dtype=torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32),
            tables.int(),
            torch.arange(len(ids)),
        )
        return list(self.decoder.forward(batch, self.kv).split([len(c) for c in chunks]))


def test_one_prefill_gives_the_logits_of_transformers(pair: Pair) -> None:
    ids = random_ids(pair.hf.config.vocab_size, NUM_POSITIONS, seed=1)
    expected = hf_logits(pair.hf, ids)
    logits = pair.decoder.logits(ids)
    assert expected.std() > 0.5, "the random model is too flat to show an error"
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= TOLERANCE


def test_ragged_chunks_over_a_poisoned_cache_give_the_logits_of_transformers(pair: Pair) -> None:
    vocab_size = pair.hf.config.vocab_size
    lengths = (NUM_POSITIONS, 41, 57)
    texts = [random_ids(vocab_size, n, seed=10 + n) for n in lengths]
    ragged = Ragged(pair.decoder, len(texts), seed=5)
    sizes = iter(random_ids(14, 1000, seed=6))
    got: list[list[Tensor]] = [[] for _ in texts]
    while any(ragged.lengths[s] < len(text) for s, text in enumerate(texts)):
        chunks = [text[ragged.lengths[s] :][: next(sizes)] for s, text in enumerate(texts)]
        if any(chunks):
            for s, rows in enumerate(ragged.step(chunks)):
                got[s].append(rows)
    for text, rows in zip(texts, got, strict=True):
        assert (torch.cat(rows) - hf_logits(pair.hf, text)).abs().max() <= TOLERANCE


def test_greedy_continuations_are_those_of_transformers_except_at_ties(pair: Pair) -> None:
    text = random_ids(pair.hf.config.vocab_size, 40, seed=2)
    ragged = Ragged(pair.decoder, 1, seed=3)
    logits = ragged.step([text])[0][-1]
    for _ in range(12):
        expected = hf_logits(pair.hf, text)[-1]
        token = int(logits.argmax())
        if token != int(expected.argmax()):
            assert expected.max() - expected[token] <= TIE
            return
        text.append(token)
        logits = ragged.step([[token]])[0][-1]


def test_the_decoder_counts_its_weights_as_transformers_does(pair: Pair) -> None:
    assert pair.decoder.num_parameters == pair.hf.num_parameters()
    assert pair.decoder.weight_bytes == 4 * pair.hf.num_parameters()


def test_a_tied_head_shares_the_storage_of_the_embedding(pair: Pair) -> None:
    weights = pair.decoder.weights
    shared = weights.head.data_ptr() == weights.embed.data_ptr()
    assert shared == pair.decoder.config.tied == pair.hf.config.tie_word_embeddings


def as_transformers_4(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 4 wrote it."""
    old = {k: v for k, v in values.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = values["dtype"]
    rope = values["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        if values["layer_types"][1] == "full_attention":
            old["layer_types"] = values["layer_types"]
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
    old["rope_scaling"] = {"type": rope["rope_type"], **scaling} if scaling else None
    return old


def test_configurations_of_transformers_4_and_5_mean_the_same(pair: Pair, tmp_path: Path) -> None:
    values = json.loads((pair.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(as_transformers_4(values)))
    assert read_config(tmp_path) == read_config(pair.directory)


SIZES = {
    "vocab_size": 60_000,
    "hidden_size": 128,
    "intermediate_size": 88,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo", "olmo2", "phi3"]
)
def test_keys_that_are_left_out_mean_what_transformers_takes_them_for(family: str, tmp_path: Path) -> None:
    given = {} if family == "gemma3_text" else SIZES
    transformers.AutoConfig.for_model(family, **given).save_pretrained(tmp_path)
    full = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **given}))
    assert read_config(tmp_path) == replace(full, eos_token_ids=(), bos_token_id=None, dtype=None)


REAL_ROPES = {
    "llama-3.1": (128, {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}),
    "qwen2.5-yarn": (128, {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 16384}),
    "yarn-beta": (64, {**YARN, "original_max_position_embeddings": 8192, "beta_fast": 20, "beta_slow": 2}),
    "linear": (80, LINEAR),
    "default": (96, {"rope_type": "default", "rope_theta": 1e6}),
}


@pytest.mark.parametrize("name", list(REAL_ROPES))
def test_far_positions_of_real_models_turn_by_the_angles_of_transformers(name: str, tmp_path: Path) -> None:
    head_dim, rope = REAL_ROPES[name]
    shape = {**SHAPE, "vocab_size": 97, "head_dim": head_dim, "max_position_embeddings": 32768}
    config = transformers.LlamaConfig(**shape, rope_parameters=dict(rope))
    config.save_pretrained(tmp_path)
    at = torch.tensor([0, 1, 17, 4095, 8192, 32767])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), at[None])
    tables = rope_tables(read_config(tmp_path).ropes[0], 32768, torch.device("cpu"))
    for table, values in zip(tables, expected, strict=True):
        # YaRN's blend rounds once elsewhere: an ulp of a slow frequency, times the position.
        assert (table[at] - values[0, :, : head_dim // 2]).abs().max() <= 2e-5


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One model for what does not depend on the family."""
    hf = build_hf(CASES["llama"], seed=99)
    directory = tmp_path_factory.mktemp("small")
    hf.save_pretrained(directory)
    return Pair(hf, load_model(directory), directory)


def test_shards_load_like_one_file(small: Pair, tmp_path: Path) -> None:
    small.hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = random_ids(97, NUM_POSITIONS, seed=4)
    assert torch.equal(load_model(tmp_path, progress=True).logits(ids), small.decoder.logits(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_checkpoints_load_in_their_own_and_in_full_precision(
    small: Pair, tmp_path: Path, dtype: torch.dtype
) -> None:
    hf = build_hf(CASES["llama"], seed=99).to(dtype)
    hf.save_pretrained(tmp_path)
    ids = random_ids(97, NUM_POSITIONS, seed=4)
    # Not hf.float(): that would keep rotary frequencies rounded to half precision.
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    expected = hf_logits(hf, ids)
    assert (load_model(tmp_path, dtype=torch.float32).logits(ids) - expected).abs().max() <= TOLERANCE
    half = load_model(tmp_path)
    assert half.dtype == dtype
    assert half.weight_bytes == 2 * half.num_parameters
    # Each of the ~20 roundings on a path errs by 2^-9 (bf16) or 2^-12 (fp16) of the values at most.
    bound = 20 * (2**-9 if dtype == torch.bfloat16 else 2**-12) * expected.std()
    error = (half.logits(ids) - expected).abs()
    assert error.mean() <= bound
    assert half.logits(ids).dtype == torch.float32


def test_longrope_serves_the_trained_context_with_its_short_factors(tmp_path: Path) -> None:
    hf = build_hf(CASES["phi3-longrope"], seed=7)
    hf.save_pretrained(tmp_path)
    decoder = load_model(tmp_path)
    assert decoder.config.max_len == 32
    assert decoder.config.max_position == 128
    ids = random_ids(43, 32, seed=8)
    assert (decoder.logits(ids) - hf_logits(hf, ids)).abs().max() <= TOLERANCE
    with pytest.raises(BadRequest, match="33 token ids given, the model takes 1 to 32"):
        decoder.logits([*ids, 0])


def test_a_token_id_outside_the_vocabulary_is_refused(small: Pair) -> None:
    with pytest.raises(BadRequest, match="token id 97 is not from 0 to 96"):
        small.decoder.logits([1, 97])


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Gemma 3 with a vision tower."""
    text = {**SHAPE, **CASES["gemma3"].changes, "vocab_size": 120}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=119,
        eos_token_id=[3, 4],
    )
    hf = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomize(hf, seed=17)
    directory = tmp_path_factory.mktemp("multimodal")
    hf.save_pretrained(directory)
    return Pair(hf, load_model(directory), directory)


def test_the_text_decoder_of_a_multimodal_gemma_is_found(multimodal: Pair) -> None:
    ids = random_ids(119, NUM_POSITIONS, seed=9)
    assert (multimodal.decoder.logits(ids) - hf_logits(multimodal.hf, ids)).abs().max() <= TOLERANCE
    assert multimodal.decoder.config.eos_token_ids == (3, 4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_the_text_decoder_is_found_under_each_prefix_in_use(
    multimodal: Pair, tmp_path: Path, prefix: str
) -> None:
    tensors = load_file(multimodal.directory / "model.safetensors")
    inner = next(n for n in tensors if n.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    save_file({n.replace(inner, prefix): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    shutil.copy(multimodal.directory / "config.json", tmp_path)
    ids = random_ids(119, 9, seed=9)
    assert torch.equal(load_model(tmp_path).logits(ids), multimodal.decoder.logits(ids))
