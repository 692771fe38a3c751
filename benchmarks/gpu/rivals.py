"""Other engines on the same models: transformers on our very weights, alone, with a static cache and as a
plain loop over two models; and those that read files.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.arm import Limits, Prompts, Sample, Setting
from benchmarks.arms.hf import TransformersArm
from benchmarks.arms.ours import EngineArm
from benchmarks.gpu.other_engine import run_elsewhere
from benchmarks.gpu.pairs import TOKEN, Pair
from benchmarks.gpu.parts import Figure, Found, Missing
from benchmarks.gpu.timing import Spread
from benchmarks.pair import pass_bytes, pocket_prompts
from benchmarks.report import quartiles
from benchmarks.rounds import run_rounds
from nudging import Base, LoadedModel
from nudging.kernels.weight import PackedWeight, Weight
from nudging.models.tensors import layer_shapes

ROUNDS = 2
# Where its layers keep what ours keep joined.
PLACES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "attn_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
}


def shared(model: LoadedModel) -> Any:
    """A transformers model whose parameters are views of our weights: not a byte of memory more."""
    transformers: Any = importlib.import_module("transformers")
    decoder = model.decoder
    config = transformers.AutoConfig.from_pretrained(model.path)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=decoder.dtype)
    state = dict(named_weights(model))
    made.load_state_dict(state, strict=False, assign=True)
    made.tie_weights()
    # What is no parameter is computed anew: it was made on no device.
    rotary = type(made.model.rotary_emb)
    made.model.rotary_emb = rotary(config).to(decoder.device)
    left = [name for name, one in (*made.named_parameters(), *made.named_buffers()) if one.is_meta]
    assert not left, f"without a value: {left}"
    made.generation_config.pad_token_id = 0
    return made.eval()


def plain(weight: Weight) -> Tensor:
    """The weight in the order of a checkpoint; on a GPU it is."""
    weight = weight.unpacked() if isinstance(weight, PackedWeight) else weight
    assert isinstance(weight, Tensor), "transformers has no int8 like ours"
    return weight


def named_weights(model: LoadedModel) -> Iterable[tuple[str, Tensor]]:
    """Our weights by the names of transformers' Llama and Qwen2."""
    weights, config = model.decoder.weights, model.decoder.config
    assert weights.norm is not None
    yield "model.embed_tokens.weight", plain(weights.embed)
    yield "model.norm.weight", weights.norm
    yield "lm_head.weight", plain(weights.head)
    rows = {field: shapes for field, (shapes, _) in layer_shapes(config).items()}
    for index, layer in enumerate(weights.layers):
        for field, names in PLACES.items():
            kinds = {"weight": getattr(layer, field), "bias": getattr(layer, f"{field}_bias", None)}
            for kind, joined in kinds.items():
                if joined is None:
                    continue
                joined = plain(joined)
                parts = joined.split(list(rows[field])) if len(names) > 1 else [joined]
                for name, part in zip(names, parts, strict=True):
                    yield f"model.layers.{index}.{name}.{kind}", part


def speed(write: Callable[[Prompts], int], prompts: list[Prompts]) -> tuple[float, float, float]:
    """Lowest, median and highest tokens per second over rounds, after one that warms up."""
    speeds = []
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        tokens = sum(write(prompt) for prompt in prompts)
        if number:
            speeds.append(tokens / (time.perf_counter() - began))
    return min(speeds), statistics.median(speeds), max(speeds)


def base_alone(pair: Pair, bandwidth: float, cache: str | None = None) -> Found:
    """`generate` of the base; `cache`: its cache_implementation, where "static" is compiled, too."""
    model = shared(pair.models[0])
    model.generation_config.cache_implementation = cache
    arm = TransformersArm("transformers", model, frozenset())
    limits = Limits(pair.scale.tokens, ignore_eos=True)
    prompts = pocket_prompts(pair.llm, pair.scale.questions)
    lower, median, upper = speed(lambda prompt: len(arm.run(prompt, limits).token_ids), prompts)
    ours = EngineArm("base alone", "base", pair.llm, Base(), "off")
    texts = [(arm.run(prompt, limits).token_ids, ours.run(prompt, limits).token_ids) for prompt in prompts]
    bound = bandwidth / pass_bytes(pair.llm, "base")
    what = f"transformers, base alone, {cache or 'growing'} cache"
    return Found(
        [
            Figure(what, median, "tok/s", bound, lower, upper),
            # Its bf16 rounds in another way, so that texts part at a near-tie sooner or later.
            Figure("texts that are ours", sum(a == b for a, b in texts) / len(texts), ""),
        ],
        {"first_tokens_alike": [alike(*both) for both in texts]},
    )


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def of_files(pair: Pair, bandwidth: float, engine: str, arm: str, seconds: float) -> Found:
    """The arm of an engine that reads checkpoints, in a process of its own, and then our base alone."""
    setting = setting_of(pair, *pair.checkpoints())
    prompts, limits = pocket_prompts(pair.llm, pair.scale.questions), Limits(pair.scale.tokens, True)
    if pair.device.type == "cuda":
        # What this process keeps for later, the other one may need now.
        torch.cuda.empty_cache()
    rounds = run_elsewhere(engine, arm, setting, prompts, limits, pair.scale.rounds, seconds)
    ours = EngineArm("base alone", "base", pair.llm, Base(), "off")
    run = run_rounds([ours], prompts, limits, pair.scale.rounds, seed=0)
    bound = bandwidth / pass_bytes(pair.llm, "base")
    speeds, found = [], Found()
    for name, each in ((arm, rounds), ("ours, base alone", run.records[0].rounds)):
        lower, median, upper = rates(each)
        speeds.append(median)
        found.figures.append(Figure(name, median, "tok/s", bound, lower, upper))
    found.figures.append(Figure("ours over it", speeds[1] / speeds[0], "x"))
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(rounds[0], run.records[0].rounds[0], strict=True)]
    found.figures.append(Figure("texts that are ours", sum(a == b for a, b in pairs) / len(pairs), ""))
    found.details["first_tokens_alike"] = [alike(*both) for both in pairs]
    return found


def setting_of(pair: Pair, base: Path, guide: Path) -> Setting:
    return Setting(base, guide, pair.device, torch.get_num_threads(), pair.folder / "other")


def missing(reason: str) -> Found:
    raise Missing(reason)


def two_models(pair: Pair, bandwidth: float) -> Found:
    """Nudging token by token as a loop over two transformers models writes it."""
    models = [shared(model) for model in pair.models]
    prompts = pocket_prompts(pair.llm, pair.scale.questions)
    limit = pair.scale.tokens
    lower, median, upper = speed(lambda prompt: len(nudged(*models, prompt, limit)), prompts)
    bound = bandwidth / pass_bytes(pair.llm, "base")
    found = Found([Figure("a loop over two transformers models", median, "tok/s", bound, lower, upper)])
    ways = {"adaptive": "auto", **{f"k={k}": k for k in pair.scale.drafts}}
    arms = [EngineArm(name, "by token", pair.llm, TOKEN, way) for name, way in ways.items()]
    for record in run_rounds(arms, prompts, Limits(limit, True), ROUNDS, seed=0).records:
        name, (low, middle, high) = record.arm.name, rates(record.rounds)
        found.figures.append(Figure(f"ours by token, {name}", middle, "tok/s", None, low, high))
        found.figures.append(Figure(f"ours over it, {name}", middle / median, "x"))
    return found


def rates(rounds: Sequence[Sequence[Sample]]) -> Spread:
    """Tokens per second over rounds."""
    return quartiles([sum(len(s.token_ids) for s in one) / sum(s.seconds for s in one) for one in rounds])


@torch.inference_mode()
def nudged(base: Any, guide: Any, prompts: Prompts, limit: int, threshold: float = 0.4) -> list[int]:
    """Each token is the base's where it is sure, else the guide's, which then catches up."""
    device = base.device
    feeds = {"base": list(prompts["base"]), "guide": list(prompts["guide"])}
    caches: dict[str, Any] = {"base": None, "guide": None}
    text: list[int] = []

    def answer(role: str, model: Any) -> Tensor:
        ids = torch.tensor([feeds[role]], device=device)
        out = model(ids, past_key_values=caches[role], use_cache=True, logits_to_keep=1)
        caches[role], feeds[role] = out.past_key_values, []
        row: Tensor = out.logits[0, -1]
        return row

    while len(text) < limit:
        top = answer("base", base).float().softmax(-1).max(-1)
        token = int(top.indices) if float(top.values) >= threshold else int(answer("guide", guide).argmax())
        text.append(token)
        for feed in feeds.values():
            feed.append(token)
    return text
