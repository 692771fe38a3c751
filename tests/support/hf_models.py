"""Tiny random models with awkward shapes, three and more of each family, built and run by transformers."""

import copy
import json
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

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


def hf_logits(hf: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits [n, vocab] of all positions, without a cache."""
    with torch.no_grad():
        return hf(torch.tensor([ids]), use_cache=False).logits[0].float()


def exact_logits(hf: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    """The same computed in fp64: where a model is sensitive, fp32 is as far from it as ours is."""
    return hf_logits(copy.deepcopy(hf).double(), ids)


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
