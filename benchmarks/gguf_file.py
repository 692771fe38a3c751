"""A Llama's checkpoint as a GGUF file, the form in which llama.cpp reads models.

    python -m benchmarks.gguf_file CHECKPOINT OUT.gguf --dtype bf16

The values are the checkpoint's, to the bit where the dtype is its own.  Rows of queries and keys change
places: llama.cpp turns neighbouring channels of a head, a checkpoint channel i with channel i + head_dim/2.
The file has no tokenizer; its model is given ids and gives ids.  Needs the package `gguf`.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nudging.api.loading import resolve
from nudging.errors import BadRequest
from nudging.models.checkpoint import list_tensors
from nudging.models.registry import ModelConfig, read_config

DTYPES = ("bf16", "fp32")


def write_gguf(checkpoint: Path, out: Path, dtype: str) -> None:
    """Write the checkpoint in directory `checkpoint` to `out`, its matrices in `dtype`, "bf16" or "fp32".

    Raises BadRequest for another dtype and for what is no plain Llama, CheckpointError for a damaged one.
    """
    if dtype not in DTYPES:
        raise BadRequest(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    gguf: Any = importlib.import_module("gguf")
    config = read_config(checkpoint)
    check_plain_llama(config)
    writer = gguf.GGUFWriter(out, "llama")
    write_sizes(writer, config)
    file_types = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "fp32": gguf.LlamaFileType.ALL_F32}
    writer.add_file_type(file_types[dtype])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    with ExitStack() as stack:
        found = list_tensors(checkpoint)
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in {info.file for info in found.values()}
        }
        for name, info in found.items():
            new_name = names.get_name(name, try_suffixes=(".weight",))
            if new_name is None:
                raise BadRequest(f"{info.file} has {name!r}, for which GGUF's Llama has no place")
            tensor = interleave(name, files[info.file].get_tensor(name), config)
            # Norms are fp32 in every GGUF file, as llama.cpp expects them.
            if dtype == "bf16" and tensor.ndim > 1:
                raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
                writer.add_tensor(new_name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(new_name, np.ascontiguousarray(tensor.float().numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def check_plain_llama(config: ModelConfig) -> None:
    """Raise BadRequest unless GGUF's "llama", without scaled rotation and biases, describes this model."""
    plain = config.family == "llama" and all(rope.kind == "default" for rope in config.ropes)
    if not plain or config.qkv_bias or config.o_bias or config.mlp_bias:
        raise BadRequest(
            f"this checkpoint is a {config.family!r}, perhaps with biases or scaled rotation; "
            "GGUF files are written of plain Llamas only"
        )


def write_sizes(writer: Any, config: ModelConfig) -> None:
    """All that llama.cpp wants to know before the tensors."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.ropes[0].dim)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_tokenizer_model("none")


def interleave(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Queries' and keys' rows in llama.cpp's order, channels i and i + head_dim/2 side by side; others as
    they are.

    tensor: [out, in]; the same shape and dtype come back.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    count = next((n for part, n in heads.items() if f".{part}." in name), None)
    if count is None:
        return tensor
    return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
def main(checkpoint: str, out: Path, dtype: str) -> None:
    """Write CHECKPOINT (a Llama's directory or pocket:NAME) to the GGUF file OUT."""
    write_gguf(resolve(checkpoint), out, dtype)


if __name__ == "__main__":
    main()
