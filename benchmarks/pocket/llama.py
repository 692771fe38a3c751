"""A Llama small enough to train on one core, with the parameter names of transformers' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THETA, EPS = 10000.0, 1e-5


@dataclass(frozen=True)
class Size:
    """The shape of a model; `ffn` is the width inside its MLP."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self, context: int) -> dict[str, object]:
        """The `config.json` of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": context,
            "rms_norm_eps": EPS,
            "rope_theta": THETA,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


class Attention(nn.Module):
    """Grouped-query attention, the softmax written out: at 128 positions on a CPU that is the fastest way."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        kv_width = size.kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(size.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape
        kv_heads, group = self.size.kv_heads, self.size.heads // self.size.kv_heads
        # [rows, kv_heads, group, length, head_dim]: keys and values are never copied.
        q = self.q_proj(x).view(rows, length, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
        k = self.k_proj(x).view(rows, length, kv_heads, 1, -1).permute(0, 2, 3, 1, 4)
        v = self.v_proj(x).view(rows, length, kv_heads, 1, -1).permute(0, 2, 3, 1, 4)
        q, k = _rotate(q, cos, sin) * self.size.head_dim**-0.5, _rotate(k, cos, sin)
        # Per key-value head one matrix product over all heads of its group.
        q = q.reshape(rows, kv_heads, group * length, -1)
        scores = (q @ k[:, :, 0].transpose(-1, -2)).view(rows, kv_heads, group, length, length) + mask
        weights = scores.softmax(-1).to(v.dtype).view(rows, kv_heads, group * length, length)
        mixed = (weights @ v[:, :, 0]).view(rows, kv_heads, group, length, -1)
        return self.o_proj(mixed.permute(0, 3, 1, 2, 4).reshape(rows, length, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Mlp(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.ffn, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.ffn, bias=False)
        self.down_proj = nn.Linear(size.ffn, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = Norm(size.hidden)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = Norm(size.hidden)
        self.mlp = Mlp(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab, size.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = Norm(size.hidden)


class Llama(nn.Module):
    """ids [rows, length] -> logits [rows, length, vocab]; input and output embeddings are one matrix."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.model = Decoder(size)

    def forward(self, ids: Tensor) -> Tensor:
        length, device = ids.shape[1], ids.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
        rate = THETA ** -(torch.arange(0, self.size.head_dim, 2, device=device) / self.size.head_dim)
        angle = torch.outer(torch.arange(length, device=device).float(), rate).repeat(1, 2)
        mask = torch.full((length, length), float("-inf"), device=device, dtype=dtype).triu(1)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, angle.cos().to(dtype), angle.sin().to(dtype), mask)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
