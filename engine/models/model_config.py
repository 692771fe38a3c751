"""What the forward pass needs to know of a model, whatever its family: data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
NormKind = Literal["rms", "layer"]
QkNorm = Literal["none", "head", "full"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a layer; `rope.py` says what each kind does with these numbers.

    dim: channels of a head that rotate (even); turning: of its pairs, those that do ("proportional");
    attention_factor multiplies cosines and sines.
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_len: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """One decoder, normalised: what differs between families is a value here and not a subclass.

    max_len: tokens a sequence may hold; max_position: what the checkpoint's position embedding allows.
    norm "layer" has no parameters (OLMo).  post_norm normalises what attention and feed-forward give back,
    before the residual sum.  qk_norm: of each head ("head") or of all heads at once ("full").
    windows: per layer, 0 for none; ropes: per layer.  Soft-caps and clip_qkv are off at 0.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_len: int
    max_position: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    tied: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str | None
    norm: NormKind = "rms"
    unit_offset: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float = 0.0
    attention_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    embedding_scale: float = 1.0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim
