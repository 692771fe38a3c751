"""SGLang: the base on a GPU through its offline engine."""

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

# Keys and values; activations and recordings have the rest of the memory.
CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class SglangArm:
    """Greedy generation by `engine`, a sglang.Engine; `vocab`: how many ids its model knows."""

    name: str
    engine: Any
    eos_ids: frozenset[int]
    vocab: int
    text: None = None

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        params = {"temperature": 0.0, "max_new_tokens": limits.max_tokens, "ignore_eos": limits.ignore_eos}
        if not limits.ignore_eos:
            params["stop_token_ids"] = sorted(self.eos_ids)
        began = time.perf_counter()
        output = self.engine.generate(input_ids=list(prompts["base"]), sampling_params=params)
        seconds = time.perf_counter() - began
        return Sample(up_to_end(output["output_ids"], self.eos_ids, limits), seconds)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities; those that it does not give have equal parts of what is left."""
        rows = []
        for ids in texts:
            said = self.engine.generate(
                input_ids=list(ids),
                sampling_params={"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True},
                return_logprob=True,
                logprob_start_len=0,
                top_logprobs_num=TOP,
            )["meta_info"]
            tops = [*said["input_top_logprobs"][1:], said["output_top_logprobs"][0]]
            rows.append(rows_of([{i: value for value, i, *_ in top} for top in tops], self.vocab))
        return rows


def sglang_arms(setting: Setting, wanted: Callable[[str], bool]) -> list[Rival]:
    """The base alone in bf16."""
    sglang: Any = importlib.import_module("sglang")
    name, config = "sglang bf16", read_config(setting.base)
    if not wanted(name):
        return []
    free, _ = torch.cuda.mem_get_info(setting.device)
    engine = sglang.Engine(
        model_path=str(setting.base),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        mem_fraction_static=(checkpoint_bytes(setting.base) + CACHE_BYTES) / free,
    )
    return [SglangArm(name, engine, frozenset(config.eos_token_ids), config.vocab_size)]
