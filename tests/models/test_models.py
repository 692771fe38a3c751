"""Every family's logits are transformers' logits: tiny random models with awkward shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nudging.errors import BadRequest
from nudging.kernels.op import FORCED
from nudging.kernels.weight import parts_of
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache
from nudging.models.loader import load_model
from nudging.models.registry import read_config
from nudging.models.rope import rope_tables
from tests.support.hf_models import (
    CASES,
    LINEAR,
    LLAMA3,
    SHAPE,
    YARN,
    build_hf,
    exact_logits,
    hf_logits,
    random_ids,
    randomize,
)

NUM_POSITIONS = 64
TOLERANCE = 1e-4  # fp32 logits of standard deviation about 2 after sums in another order
TIE = 1e-5


class Pair(NamedTuple):
    """A checkpoint as transformers runs it and as this engine does."""

    hf: transformers.PreTrainedModel
    decoder: Decoder
    directory: Path


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    hf = build_hf(case, seed=list(CASES).index(request.param))
    directory = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(directory)
    return Pair(hf, load_model(directory, max_len=case.max_len), directory)


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
    expected = exact_logits(pair.hf, ids)
    logits = pair.decoder.logits(ids)
    assert expected.std() > 0.5, "the random model is too flat to show an error"
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= TOLERANCE


def in_ragged_chunks(decoder: Decoder, texts: list[list[int]]) -> list[Tensor]:
    """The logits [n, vocab] of each text, all in one batch, some random tokens of each per step."""
    ragged = Ragged(decoder, len(texts), seed=5)
    sizes = iter(random_ids(14, 1000, seed=6))
    got: list[list[Tensor]] = [[] for _ in texts]
    while any(ragged.lengths[s] < len(text) for s, text in enumerate(texts)):
        chunks = [text[ragged.lengths[s] :][: next(sizes)] for s, text in enumerate(texts)]
        if any(chunks):
            for s, rows in enumerate(ragged.step(chunks)):
                got[s].append(rows)
    return [torch.cat(rows) for rows in got]


def test_ragged_chunks_over_a_poisoned_cache_give_the_logits_of_transformers(pair: Pair) -> None:
    texts = [random_ids(pair.hf.config.vocab_size, n, seed=n) for n in (NUM_POSITIONS, 41, 57)]
    for text, logits in zip(texts, in_ragged_chunks(pair.decoder, texts), strict=True):
        assert (logits - hf_logits(pair.hf, text)).abs().max() <= TOLERANCE


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def decoder(request: pytest.FixtureRequest, pair: Pair) -> Decoder:
    """The checkpoint in each dtype that promises exactness."""
    return load_model(pair.directory, request.param, max_len=pair.decoder.config.max_len)


invariant = pytest.mark.skipif(FORCED == "reference", reason="the references do not promise it")


@invariant
def test_a_row_has_the_same_bits_whatever_is_computed_with_it(decoder: Decoder) -> None:
    """However the prompt is cut, whoever else is in the batch."""
    texts = [random_ids(decoder.config.vocab_size, n, seed=n) for n in (NUM_POSITIONS, 41, 57)]
    for text, logits in zip(texts, in_ragged_chunks(decoder, texts), strict=True):
        assert torch.equal(logits, decoder.logits(text))


@invariant
def test_a_row_has_the_same_bits_among_1_to_16_rows_in_any_order(decoder: Decoder) -> None:
    """Each pass ends all texts at once: one row, or the last 2 to 16 of them, with neighbours or without."""
    vocab, read = decoder.config.vocab_size, 13
    texts = [random_ids(vocab, read + rows, seed=rows) for rows in range(1, 17)]
    alone = [decoder.logits(text)[read:] for text in texts]
    for order in (range(16), reversed(range(16))):
        listed = list(order)
        ragged = Ragged(decoder, len(texts), seed=7)
        ragged.step([texts[i][:read] for i in listed])
        for i, logits in zip(listed, ragged.step([texts[i][read:] for i in listed]), strict=True):
            assert torch.equal(logits, alone[i])
    for text, want in zip(texts, alone, strict=True):
        single = Ragged(decoder, 1, seed=8)
        single.step([text[:read]])
        assert torch.equal(single.step([text[read:]])[0], want)


@invariant
def test_a_row_has_the_same_bits_from_one_thread_and_from_two(
    decoder: Decoder, threads: Callable[[int], None]
) -> None:
    text = random_ids(decoder.config.vocab_size, 96, seed=9)  # so many rows that threads do share the work
    results = []
    for count in (1, 2):
        threads(count)
        results.append(decoder.logits(text))
    assert torch.equal(*results)


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
    shared = parts_of(weights.head)[0].data_ptr() == parts_of(weights.embed)[0].data_ptr()
    assert shared == pair.decoder.config.tied == pair.hf.config.tie_word_embeddings


def as_transformers_4(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 4 wrote it."""
    old = {k: v for k, v in values.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = values["dtype"]
    rope, kind = values["rope_parameters"], "type"
    if "full_attention" in rope:
        kind = "rope_type"  # what Gemma 3 had from its first day
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        if values["layer_types"][1] == "full_attention":
            old["layer_types"] = values["layer_types"]
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
    old["rope_scaling"] = {kind: rope["rope_type"], **scaling} if scaling else None
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
    less = {name: value for name, value in given.items() if name != "max_position_embeddings"}
    transformers.AutoConfig.for_model(family, **less).save_pretrained(tmp_path)
    full = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **less}))
    assert read_config(tmp_path) == replace(full, eos_token_ids=(), bos_token_id=None, dtype=None)


REAL_ROPES = {
    "llama-3.1": (128, {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}),
    "qwen2.5-yarn": (128, {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 16384}),
    "yarn-beta": (64, {**YARN, "original_max_position_embeddings": 8192, "beta_fast": 20, "beta_slow": 2}),
    "yarn-exact": (64, {**YARN, "original_max_position_embeddings": 8192, "truncate": False}),
    "yarn-slow": (16, {**YARN, "rope_theta": 20.0, "original_max_position_embeddings": 8192}),
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
        # An ulp of a frequency would be 1e-3 here: the frequencies have to be the same bits.
        assert (table[at] - values[0, :, : head_dim // 2]).abs().max() <= 1e-6


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
    assert not torch.equal(half.logits(ids), half.logits(ids).to(dtype).float()), "the head rounds its logits"


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
