"""vLLM: the base on a GPU through its offline engine, alone and with the guide as the model that drafts."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.arm import (
    TOP,
    Limits,
    Prompts,
    Rival,
    Sample,
    Setting,
    checkpoint_bytes,
    rows_of,
    up_to_end,
)
from nudging.models.registry import read_config

DRAFTS = 4
# Besides the weights: keys and values, activations and recordings.
WORKING_BYTES = 12 << 30


@dataclass(frozen=True)
class VllmArm:
    """Greedy generation by `engine`, a vllm.LLM; `vocab`: how many ids its model knows."""

    name: str
    engine: Any
    eos_ids: frozenset[int]
    vocab: int
    text: None = None

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        stops = [] if limits.ignore_eos else sorted(self.eos_ids)
        began = time.perf_counter()
        output = self._generate(
            prompts["base"], max_tokens=limits.max_tokens, ignore_eos=limits.ignore_eos, stop_token_ids=stops
        )
        seconds = time.perf_counter() - began
        return Sample(up_to_end(output.outputs[0].token_ids, self.eos_ids, limits), seconds)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities; those that it does not give have equal parts of what is left."""
        rows = []
        for ids in texts:
            output = self._generate(ids, max_tokens=1, ignore_eos=True, prompt_logprobs=TOP, logprobs=TOP)
            tops = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
            rows.append(rows_of([{i: one.logprob for i, one in top.items()} for top in tops], self.vocab))
        return rows

    def _generate(self, ids: Sequence[int], **params: Any) -> Any:
        vllm: Any = importlib.import_module("vllm")
        wanted = vllm.SamplingParams(temperature=0.0, detokenize=False, **params)
        return self.engine.generate([{"prompt_token_ids": list(ids)}], wanted, use_tqdm=False)[0]


def vllm_arms(setting: Setting, wanted: Callable[[str], bool]) -> list[Rival]:
    """The base alone in bf16, and with drafts of the guide."""
    vllm: Any = importlib.import_module("vllm")
    config = read_config(setting.base)
    total = torch.cuda.get_device_properties(setting.device).total_memory
    drafting = {"method": "draft_model", "model": str(setting.guide), "num_speculative_tokens": DRAFTS}
    arms: list[Rival] = []
    for name, models, more in (
        ("vllm bf16", (setting.base,), {}),
        ("vllm bf16 drafted", (setting.base, setting.guide), {"speculative_config": drafting}),
    ):
        if wanted(name):
            needed = sum(map(checkpoint_bytes, models)) + WORKING_BYTES
            engine = vllm.LLM(
                model=str(setting.base),
                dtype="bfloat16",
                skip_tokenizer_init=True,
                gpu_memory_utilization=needed / total,
                **more,
            )
            arms.append(VllmArm(name, engine, frozenset(config.eos_token_ids), config.vocab_size))
    return arms
