"""The forward pass of every family: one decoder over the ops of `nudging.kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, KVCache
from ..errors import BadRequest
from ..kernels.add_rms_norm import add_rms_norm
from ..kernels.gated_linear import gated_linear
from ..kernels.layer_norm import layer_norm
from ..kernels.linear import linear
from ..kernels.linear_rope_append import linear_rope_append, split_heads
from ..kernels.paged_attention import paged_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope_append import rope_append
from ..kernels.soft_cap import soft_cap
from .rope import rope_tables
from .spec import ModelConfig


class Layer(NamedTuple):
    """The weights of one layer; None where the family has none.

    qkv: [q + k + v, hidden], gate_up: [2 * intermediate, hidden], gate first; norms: [dim] of what they
    normalise.
    """

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    attn_norm: Tensor | None = None
    attn_post_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Weights(NamedTuple):
    """All weights of a decoder; `head` is `embed` itself where tied, `norm` None for a parameterless one."""

    embed: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor | None
    head: Tensor


class Decoder:
    """A model on a device.  `forward` has no state but the cache it is given."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.weights = weights
        tables = {r: rope_tables(r, config.max_len, self.device) for r in dict.fromkeys(config.ropes)}
        self._rope_tables = [tables[r] for r in config.ropes]
        # Gemma was trained with the scale rounded to the model's dtype.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype, device=self.device)

    @property
    def num_parameters(self) -> int:
        """Weights, a tied head counted once."""
        return sum(w.numel() for w in self._distinct())

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""
        return sum(w.numel() * w.element_size() for w in self._distinct())

    def _distinct(self) -> list[Tensor]:
        top = (self.weights.embed, self.weights.norm, self.weights.head)
        every = [*top, *(w for layer in self.weights.layers for w in layer)]
        return list({w.data_ptr(): w for w in every if w is not None}.values())

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """The logits [len(batch.logit_rows), vocab] fp32 of the wanted rows, final soft-cap applied.

        Writes the keys and values of all rows into their slots of `kv`.  A row's logits do not depend on the
        other rows: every op computes each row alone.
        """
        config = self.config
        x = self.weights.embed[batch.ids]
        if config.embedding_scale != 1.0:
            x = x * self._embedding_scale
        y: Tensor | None = None  # what the block before gives to the residual stream
        for index, layer in enumerate(self.weights.layers):
            x, y = self._enter_block(x, y, layer.attn_norm)
            y = self._attention(index, layer, y, batch, kv)
            y = self._norm(y, layer.attn_post_norm) if config.post_norm else y
            x, y = self._enter_block(x, y, layer.mlp_norm)
            y = gated_linear(y, layer.gate_up, config.activation, layer.gate_up_bias)
            y = linear(y, layer.down, layer.down_bias)
            y = self._norm(y, layer.mlp_post_norm) if config.post_norm else y
        x = x if y is None else x + y
        x = self._norm(x[batch.logit_rows], self.weights.norm)
        logits = linear(x, self.weights.head, out_dtype=torch.float32)
        return soft_cap(logits, config.final_soft_cap) if config.final_soft_cap else logits

    def _enter_block(self, x: Tensor, y: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream x + y, and what the next block reads of it: its norm, if there is a pre-norm.

        x, y: [rows, hidden], y None for nothing to add.
        """
        config = self.config
        if y is not None and weight is not None and config.pre_norm:
            return add_rms_norm(x, y, weight, config.norm_eps, config.unit_offset)
        x = x if y is None else x + y
        return x, self._norm(x, weight) if config.pre_norm else x

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """x: [..., dim], normalised over dim."""
        config = self.config
        if weight is None:
            return layer_norm(x, config.norm_eps)
        return rms_norm(x, weight, config.norm_eps, config.unit_offset)

    def _attention(self, index: int, layer: Layer, x: Tensor, batch: Batch, kv: KVCache) -> Tensor:
        """What attention gives back to the residual stream, [rows, hidden].  x: [rows, hidden]."""
        config = self.config
        k_cache, v_cache = kv.layer(index)
        q = self._append(index, layer, x, batch, k_cache, v_cache)
        out = paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seq_lens,
            config.attention_scale,
            config.windows[index],
            config.attention_soft_cap,
        )
        return linear(out.flatten(1), layer.o, layer.o_bias)

    def _append(
        self, index: int, layer: Layer, x: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """The rotated queries [rows, heads, head_dim] of x [rows, hidden]; its keys and values are cached."""
        config = self.config
        cos, sin = self._rope_tables[index]
        rest = (batch.positions, cos, sin, k_cache, v_cache, batch.slot_mapping)
        if not config.clip_qkv and config.qk_norm == "none":
            return linear_rope_append(x, layer.qkv, layer.qkv_bias, *rest)
        qkv = linear(x, layer.qkv, layer.qkv_bias)
        if config.clip_qkv:
            qkv = qkv.clamp(-config.clip_qkv, config.clip_qkv)
        q, k, v = split_heads(qkv, k_cache)
        if config.qk_norm != "none":
            q, k = self._qk_norm(layer, q, k)
        return rope_append(q, k, v, *rest)

    def _qk_norm(self, layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [rows, heads, head_dim], normalised."""
        if self.config.qk_norm == "head":
            return self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return (
            self._norm(q.flatten(1), layer.q_norm).view_as(q),
            self._norm(k.flatten(1), layer.k_norm).view_as(k),
        )

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [n, vocab] fp32 after each of `token_ids`, in one pass over a throwaway cache.

        Raises BadRequest when there are none, too many, or one is not in the vocabulary.
        """
        n = len(token_ids)
        if not 1 <= n <= self.config.max_len:
            raise BadRequest(f"{n} token ids given, the model takes 1 to {self.config.max_len}")
        wrong = next((i for i in token_ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise BadRequest(f"token id {wrong} is not from 0 to {self.config.vocab_size - 1}")
        config = self.config
        kv = KVCache(config.num_layers, 1, n, config.num_kv_heads, config.head_dim, self.dtype, self.device)
        at = torch.arange(n, device=self.device)
        batch = Batch(
            ids=torch.tensor(token_ids, dtype=torch.int64, device=self.device),
            positions=at,
            slot_mapping=at,
            cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([n], dtype=torch.int32, device=self.device),
            block_tables=torch.zeros((1, 1), dtype=torch.int32, device=self.device),
            logit_rows=at,
        )
        return self.forward(batch, kv)
