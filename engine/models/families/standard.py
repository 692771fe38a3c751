"""The common decoder: what Llama's configuration keys mean, and Llama's names for the tensors.

Each family starts from this description and replaces what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nudging.models.json_config import RawConfig
from nudging.models.model_config import Activation, ModelConfig, Rope
from nudging.models.rope import MAX_POSITION, read_rope

# Far above any model there is: such sizes are damage, and would fail later as a huge allocation.
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 12
MAX_VOCAB = 1 << 24

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_python": "gelu",
}
DEFAULT_ACTIVATIONS = {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Family:
    """How one family of checkpoints is described and named.

    tensors: for each weight of `decoder.Layer` the checkpoint's tensors, joined along their first dimension;
    prefixes: where the decoder may lie in the checkpoint; ignored: prefixes of tensors that are not the
    decoder's, such as a vision tower's.
    """

    describe: Callable[[RawConfig], ModelConfig]
    tensors: Mapping[str, tuple[str, ...]]
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = ()


TENSORS: Mapping[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down": ("mlp.down_proj.weight",),
    "down_bias": ("mlp.down_proj.bias",),
}

# Norms after attention and feed-forward, as Gemma and OLMo 2 name them.
POST_NORM_TENSORS: Mapping[str, tuple[str, ...]] = {
    "attn_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",),
}


RopeReader = Callable[[RawConfig, int, int], tuple[Rope, int]]


def describe(
    raw: RawConfig,
    activation_key: str = "hidden_act",
    rope_reader: RopeReader = read_rope,
    attention_bias: bool = True,
    mlp_bias: bool = False,
) -> ModelConfig:
    """The description of a checkpoint that does nothing unlike Llama but what the arguments say.

    rope_reader: as `rope.read_rope`, from the configuration, head_dim and max_position_embeddings;
    attention_bias, mlp_bias: whether the family may have them.  Raises CheckpointError.
    """
    hidden = raw.integer("hidden_size", MAX_WIDTH)
    heads = raw.integer("num_attention_heads", MAX_WIDTH)
    kv_heads = raw.integer("num_key_value_heads", heads, default=heads)
    if heads % kv_heads:
        raw.wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if not raw.has("head_dim") and hidden % heads:
        raw.wrong("hidden_size", f"a multiple of num_attention_heads = {heads}, or head_dim be given")
    head_dim = raw.integer("head_dim", MAX_WIDTH, default=hidden // heads)
    layers = raw.integer("num_hidden_layers", MAX_LAYERS)
    position = raw.integer("max_position_embeddings", MAX_POSITION)
    act = raw.text(activation_key, default=DEFAULT_ACTIVATIONS[activation_key])
    if act not in ACTIVATIONS:
        raw.wrong(activation_key, f"one of {', '.join(ACTIVATIONS)}")
    rope, position = rope_reader(raw, head_dim, position)
    bias = attention_bias and raw.flag("attention_bias", False)
    return ModelConfig(
        family=raw.text("model_type"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=raw.integer("intermediate_size", MAX_WIDTH),
        vocab_size=raw.integer("vocab_size", MAX_VOCAB),
        max_len=rope.original_max_len if rope.kind == "longrope" else position,
        max_position=position,
        norm_eps=raw.number("rms_norm_eps", default=1e-6, high=1.0),
        activation=ACTIVATIONS[act],
        attention_scale=head_dim**-0.5,
        windows=(0,) * layers,
        ropes=(rope,) * layers,
        tied=raw.flag("tie_word_embeddings", False),
        eos_token_ids=(),
        bos_token_id=None,
        dtype=None,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=mlp_bias and raw.flag("mlp_bias", False),
    )
