"""All layers and the head in one call of C++: the same kernels as op by op, so the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from nudging import _C
from nudging.kernels.cpu import BEST, DTYPES, require, team
from nudging.kernels.gated_act import ACTIVATIONS
from nudging.kernels.linear import linear
from nudging.kernels.weight import PackedWeight, Weight, parts_of, whole_panels
from nudging.models.batch import Batch
from nudging.models.kv_cache import KVCache
from nudging.models.model_config import ModelConfig
from nudging.models.weights import Layer, Weights

Tables = list[tuple[Tensor, Tensor]]


def serves(config: ModelConfig, weights: Weights) -> bool:
    """Whether the pass may run so: where C++ runs the ops, and the family asks for nothing that it lacks.

    It lacks clamped projections (`clip_qkv`) and layer norms of queries and keys: such models run op by op.
    """
    in_cpp = runs_in_cpp(weights.embed.dtype, weights.embed.device) and config.head_dim <= _C.MAX_HEAD_DIM
    return in_cpp and not config.clip_qkv and (config.qk_norm == "none" or config.norm == "rms")


def runs_in_cpp(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether C++ runs the products of that dtype there."""
    some = torch.empty((1, 1), dtype=dtype, device=device)
    return linear.chosen(some, some) == "cpu"


class WholePass:
    """The pass of one decoder.  `tables`: the cosines and sines of each layer.  ValueError for what is not
    dense or not of the model's shapes.
    """

    def __init__(self, config: ModelConfig, weights: Weights, tables: Tables, isa: _C.Isa = BEST) -> None:
        self.config = config
        self.weights = weights  # the addresses below are theirs
        self.tables = tables
        self.isa = isa
        self.dtype = weights.embed.dtype
        hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
        self._model = _C.DecoderModel(
            DTYPES[self.dtype],
            ACTIVATIONS[config.activation],
            _C.QkNorm.__members__[config.qk_norm],
            hidden,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            config.max_len,
            config.norm_eps,
            config.attention_scale,
            config.attention_soft_cap,
            config.final_soft_cap,
            config.unit_offset,
            config.pre_norm,
            config.post_norm,
            self._vector(weights.norm, hidden),
            self._projection(weights.head, None, config.vocab_size, hidden),
        )
        for index, layer in enumerate(weights.layers):
            self._add_layer(index, layer, hidden, heads * config.head_dim)

    def _add_layer(self, index: int, layer: Layer, hidden: int, qkv: int) -> None:
        config = self.config
        inner, each = config.intermediate_size, config.qk_norm == "head"
        cos, sin = self.tables[index]
        shape = (config.max_len, cos.shape[1])
        self._model.add_layer(
            self._projection(layer.qkv, layer.qkv_bias, qkv, hidden),
            self._projection(layer.o, layer.o_bias, hidden, config.q_size),
            self._projection(layer.gate_up, layer.gate_up_bias, 2 * inner, hidden),
            self._projection(layer.down, layer.down_bias, hidden, inner),
            self._vector(layer.attn_norm, hidden),
            self._vector(layer.attn_post_norm, hidden),
            self._vector(layer.mlp_norm, hidden),
            self._vector(layer.mlp_post_norm, hidden),
            self._vector(layer.q_norm, config.head_dim if each else config.q_size),
            self._vector(layer.k_norm, config.head_dim if each else config.kv_size),
            _address("cos", cos, shape, torch.float32),
            _address("sin", sin, shape, torch.float32),
            cos.shape[1],
            config.windows[index],
        )

    def _vector(self, weight: Tensor | None, dim: int) -> int:
        return 0 if weight is None else _address("a norm", weight, (dim,), self.dtype)

    def _projection(
        self, weight: Weight, bias: Tensor | None, out: int, into: int
    ) -> tuple[int, int, int, bool]:
        """The addresses of weight, scales and bias, and whether the weight is packed."""
        values, scales = parts_of(weight)
        is_packed = isinstance(weight, PackedWeight)
        shape = whole_panels(out) if is_packed else out, into
        at = _address("a weight", values, shape, self.dtype if scales is None else torch.int8)
        by = 0 if scales is None else _address("scales", scales, (out,), torch.float32)
        return at, by, self._vector(bias, out), is_packed

    def __call__(self, x: Tensor, batch: Batch, kv: KVCache) -> Tensor:
        """The logits as `Decoder.forward` gives them back, from the embeddings x: [rows, hidden]."""
        config = self.config
        rows, wanted = batch.positions.shape[0], batch.logit_rows.shape[0]
        seqs, max_blocks = batch.block_tables.shape
        blocks = kv.k.shape[1]
        cache = (config.num_layers, blocks, kv.block_size, config.num_kv_heads, config.head_dim)
        logits = x.new_empty((wanted, config.vocab_size), dtype=torch.float32)
        _C.decode(
            self.isa,
            team(),
            self._model,
            _address("x", x, (rows, config.hidden_size), self.dtype),
            _address("positions", batch.positions, (rows,), torch.int64),
            _address("slot_mapping", batch.slot_mapping, (rows,), torch.int64),
            _address("block_tables", batch.block_tables, (seqs, max_blocks), torch.int32),
            _address("cu_seqlens_q", batch.cu_seqlens_q, (seqs + 1,), torch.int32),
            _address("seq_lens", batch.seq_lens, (seqs,), torch.int32),
            _address("logit_rows", batch.logit_rows, (wanted,), torch.int64),
            _address("keys", kv.k, cache, self.dtype),
            _address("values", kv.v, cache, self.dtype),
            logits.data_ptr(),
            rows,
            seqs,
            max_blocks,
            blocks,
            kv.block_size,
            wanted,
        )
        return logits


def _address(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where `tensor` lies; ValueError unless it is dense and just this."""
    if require("decode", name, tensor, shape, dtype) is not tensor:
        raise ValueError(f"decode: {name} is not contiguous, its strides are {tensor.stride()}")
    return tensor.data_ptr()
