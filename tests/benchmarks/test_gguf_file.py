"""A GGUF file says what its checkpoint says, in llama.cpp's order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gguf_file import check_plain_llama, interleave, write_gguf
from benchmarks.inflate import inflate_checkpoint, shape
from nudging.api.loading import resolve
from nudging.errors import BadRequest
from nudging.models.registry import read_config

# Where all tests are collected for the GPU's sake, it may be missing.
gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_gguf_file_has_the_checkpoint_to_the_bit(tmp_path: Path, dtype: str) -> None:
    source = resolve("pocket:base")
    write_gguf(source, tmp_path / "base.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "base.gguf")
    read = {tensor.name: tensor for tensor in reader.tensors}
    config, state = read_config(source), load_file(source / "model.safetensors")
    assert len(read) == len(state)
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.3.ffn_down", "model.layers.3.mlp.down_proj"),
        ("blk.5.attn_v", "model.layers.5.self_attn.v_proj"),
        ("output_norm", "model.norm"),
    ):
        assert torch.equal(values(read[f"{theirs}.weight"]), state[f"{ours}.weight"].float()), theirs
    for theirs, ours, heads in (("attn_q", "q_proj", 6), ("attn_k", "k_proj", 2)):
        name = f"model.layers.2.self_attn.{ours}.weight"
        back = values(read[f"blk.2.{theirs}.weight"]).unflatten(0, (heads, -1, 2)).transpose(1, 2)
        assert torch.equal(back.flatten(0, 2), state[name].float()), theirs
    kinds = {"bf16": gguf.GGMLQuantizationType.BF16, "fp32": gguf.GGMLQuantizationType.F32}
    assert read["token_embd.weight"].tensor_type == kinds[dtype]
    assert read["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    wanted = {
        "general.architecture": "llama",
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
        "llama.rope.freq_base": np.float32(config.ropes[0].theta),
        "llama.feed_forward_length": config.intermediate_size,
        "llama.vocab_size": config.vocab_size,
    }
    assert {key: reader.get_field(key).contents() for key in wanted} == wanted


def values(tensor: Any) -> Tensor:
    """A tensor of a GGUF file in fp32, [out, in]."""
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def test_attention_is_the_same_over_neighbouring_channels() -> None:
    config = read_config(resolve("pocket:base"))
    torch.manual_seed(0)
    queries, keys = torch.randn(config.q_size, 5).double(), torch.randn(config.kv_size, 5).double()
    near_queries = interleave("model.layers.0.self_attn.q_proj.weight", queries, config)
    near_keys = interleave("model.layers.0.self_attn.k_proj.weight", keys, config)
    query, key, half = queries[: config.head_dim], keys[: config.head_dim], config.head_dim // 2
    near_query, near_key = near_queries[: config.head_dim], near_keys[: config.head_dim]

    def turned(rows: Tensor, pairs: list[tuple[int, int]], position: int) -> Tensor:
        out = rows.clone()
        for i, (a, b) in enumerate(pairs):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / config.head_dim)).double()
            out[a] = rows[a] * angle.cos() - rows[b] * angle.sin()
            out[b] = rows[a] * angle.sin() + rows[b] * angle.cos()
        return out

    apart = [(i, i + half) for i in range(half)]
    near = [(2 * i, 2 * i + 1) for i in range(half)]
    scores = turned(query, apart, 7).T @ turned(key, apart, 3)
    near_scores = turned(near_query, near, 7).T @ turned(near_key, near, 3)
    torch.testing.assert_close(near_scores, scores)
    assert not torch.allclose(turned(query, near, 7).T @ turned(key, near, 3), scores)


def test_gguf_files_of_inflated_checkpoints_have_their_sizes(tmp_path: Path) -> None:
    inflate_checkpoint(resolve("pocket:guide"), tmp_path, shape(192, 4, 6, 2, 600, 2100), shard_bytes=1 << 20)
    write_gguf(tmp_path, tmp_path / "guide.gguf", "bf16")
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "guide.gguf").tensors}
    assert read["token_embd.weight"].shape.tolist() == [192, 2100], "ggml counts columns first"
    assert read["blk.3.ffn_up.weight"].shape.tolist() == [192, 600]


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    config = read_config(resolve("pocket:base"))
    check_plain_llama(config)
    scaled = tuple(replace(rope, kind="llama3") for rope in config.ropes)
    changes: list[dict[str, Any]] = [{"family": "qwen2"}, {"qkv_bias": True}, {"ropes": scaled}]
    for change in changes:
        with pytest.raises(BadRequest, match="plain Llamas only"):
            check_plain_llama(replace(config, **change))
    with pytest.raises(BadRequest, match="'fp16'"):
        write_gguf(resolve("pocket:base"), tmp_path / "base.gguf", "fp16")
