"""The forward pass of every family: one decoder over the ops of `nudging.kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nudging.errors import BadRequest
from nudging.kernels.add_rms_norm import add_rms_norm
from nudging.kernels.embed import embed
from nudging.kernels.gated_linear import gated_linear
from nudging.kernels.layer_norm import layer_norm
from nudging.kernels.linear import linear
from nudging.kernels.linear_add import linear_add
from nudging.kernels.linear_rope_append import linear_rope_append, split_heads
from nudging.kernels.paged_attention import paged_attention
from nudging.kernels.rms_norm import Norm
from nudging.kernels.rope_append import HeadNorm, rope_append
from nudging.kernels.soft_cap import soft_cap
from nudging.kernels.weight import Weight, num_bytes, num_parameters, parts_of
from nudging.models.batch import Batch
from nudging.models.cpu_forward import WholePass, serves
from nudging.models.kv_cache import KVCache
from nudging.models.model_config import ModelConfig
from nudging.models.rope import rope_tables
from nudging.models.weights import Layer, Weights


class Between(NamedTuple):
    """What one block of a layer leaves to the next one.

    x: the residual stream [rows, hidden]; squares: see `Norm`; entered: what the next block reads, where it
    is known already.
    """

    x: Tensor
    squares: Tensor | None = None
    entered: Tensor | None = None


class Decoder:
    """A model on a device.  `forward` has no state but the cache it is given."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.weights = weights
        tables = {r: rope_tables(r, config.max_len, self.device) for r in dict.fromkeys(config.ropes)}
        self._rope_tables = [tables[r] for r in config.ropes]
        self.whole_pass = WholePass(config, weights, self._rope_tables) if serves(config, weights) else None
        # Gemma was trained with the scale rounded to the model's dtype.
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=self.dtype))

    @property
    def num_parameters(self) -> int:
        """Weights, a tied head counted once."""
        config, weights = self.config, self.weights
        twice = config.tied and weights.head is not weights.embed
        every = sum(map(num_parameters, weights.distinct()))
        return every - (num_parameters(weights.embed) if twice else 0)

    @property
    def precision(self) -> str:
        """What weights are kept in: the dtype, and int8 before it where matrix products read that."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"int8, {dtype}" if parts_of(self.weights.head)[0].dtype == torch.int8 else dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""
        return sum(map(num_bytes, self.weights.distinct()))

    @property
    def head_share(self) -> float:
        """Of the products that an answered row takes: those of the LM head, which others do without."""
        weights = self.weights
        head = num_parameters(weights.head)
        body = sum(num_parameters(w) for layer in weights.layers for w in layer if w is not None)
        return head / (head + body)

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """The logits [len(batch.logit_rows), vocab] fp32 of the wanted rows, final soft-cap applied.

        Writes the keys and values of all rows into their slots of `kv`.  A row's logits do not depend on the
        other rows: every op computes each row alone.
        """
        if self.whole_pass is not None:
            return self.whole_pass(self._embedded(batch).x, batch, kv)
        return self.op_by_op(self._embedded(batch), batch, kv)

    def before_head(self, batch: Batch, kv: KVCache) -> tuple[Tensor, Norm | None]:
        """`forward` but for the head: what that reads, [rows, hidden], wanted or not, and the norm that it
        has to pass first, if any.
        """
        return self._normalising(self._layers(self._embedded(batch), batch, kv), self.weights.norm)

    def op_by_op(self, embedded: Between, batch: Batch, kv: KVCache) -> Tensor:
        """`forward` from the embeddings of all rows on; the definition of the whole pass in C++."""
        x, norm = self._normalising(self._layers(embedded, batch, kv), self.weights.norm)
        if norm is not None:
            norm = norm._replace(squares=None)  # those of all rows
        logits = linear(x[batch.logit_rows], self.weights.head, out_dtype=torch.float32, norm=norm)
        return soft_cap(logits, self.config.final_soft_cap) if self.config.final_soft_cap else logits

    def _embedded(self, batch: Batch) -> Between:
        return Between(*embed(self.weights.embed, batch.ids, self._embedding_scale))

    def _layers(self, now: Between, batch: Batch, kv: KVCache) -> Between:
        """All layers."""
        layers = self.weights.layers
        for index, (layer, following) in enumerate(zip(layers, (*layers[1:], None), strict=True)):
            next_norm = self.weights.norm if following is None else following.attn_norm
            out = self._attention(index, layer, now, batch, kv)
            now = self._leave(now, out, layer.o, layer.o_bias, (layer.attn_post_norm, layer.mlp_norm), kv)
            out = self._gated(layer, now)
            now = self._leave(now, out, layer.down, layer.down_bias, (layer.mlp_post_norm, next_norm), kv)
        return now

    def _enter(self, now: Between, weight: Tensor | None) -> tuple[Tensor, Norm | None]:
        """What a block's first product reads, and the norm by `weight` that it has to pass first, if any."""
        return self._normalising(now, weight) if self.config.pre_norm else (now.x, None)

    def _normalising(self, now: Between, weight: Tensor | None) -> tuple[Tensor, Norm | None]:
        """What a product reads of the stream, and the norm by `weight` that it has to pass first.

        A layer norm is computed here, unless what the product reads is known already.
        """
        config = self.config
        if now.entered is not None:
            return now.entered, None
        if weight is None:
            return layer_norm(now.x, config.norm_eps), None
        return now.x, Norm(weight, config.norm_eps, config.unit_offset, now.squares)

    def _leave(
        self,
        now: Between,
        out: Tensor,
        weight: Weight,
        bias: Tensor | None,
        norms: tuple[Tensor | None, Tensor | None],
        kv: KVCache,
    ) -> Between:
        """A block's last product of `out` into the residual stream.

        norms: that of the product, and that of the next block or the head, which is computed with it.
        """
        config = self.config
        if not config.post_norm:
            return Between(*linear_add(out, weight, now.x, bias, kv.arrivals))
        y, (after, before) = linear(out, weight, bias), norms
        x, entered = add_rms_norm(now.x, y, before, config.norm_eps, config.unit_offset, after)
        return Between(x, None, None if before is None else entered)

    def _attention(self, index: int, layer: Layer, now: Between, batch: Batch, kv: KVCache) -> Tensor:
        """What all heads read, [rows, heads * head_dim]."""
        config = self.config
        k_cache, v_cache = kv.layer(index)
        q = self._append(index, layer, now, batch, kv)
        how = (config.attention_scale, config.windows[index], config.attention_soft_cap)
        if batch.attention is not None:
            out = batch.attention(q, k_cache, v_cache, *how)
        else:
            rows = (batch.block_tables, batch.cu_seqlens_q, batch.seq_lens)
            out = paged_attention(q, k_cache, v_cache, *rows, *how, kv.arrivals)
        return out.flatten(1)

    def _gated(self, layer: Layer, now: Between) -> Tensor:
        """The MLP's inner activations [rows, intermediate]."""
        x, norm = self._enter(now, layer.mlp_norm)
        return gated_linear(x, layer.gate_up, self.config.activation, layer.gate_up_bias, norm)

    def _append(self, index: int, layer: Layer, now: Between, batch: Batch, kv: KVCache) -> Tensor:
        """The rotated queries [rows, heads, head_dim]; keys and values are cached."""
        clip, caches = self.config.clip_qkv, kv.layer(index)
        rest = (batch.positions, *self._rope_tables[index], *caches, batch.slot_mapping)
        x, norm = self._enter(now, layer.attn_norm)
        head_norm = self._head_norm(layer)
        if not clip:
            return linear_rope_append(x, layer.qkv, layer.qkv_bias, *rest, norm, head_norm, kv.arrivals)
        qkv = linear(x, layer.qkv, layer.qkv_bias, norm=norm).clamp(-clip, clip)
        return rope_append(*split_heads(qkv, caches[0]), *rest, head_norm)

    def _head_norm(self, layer: Layer) -> HeadNorm | None:
        """The norm of queries and keys, if the family has one."""
        if self.config.qk_norm == "none":
            return None
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        return HeadNorm(layer.q_norm, layer.k_norm, self.config.norm_eps, self.config.unit_offset)

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
