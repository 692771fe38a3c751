"""llama.cpp: the base through llama-cpp-python, from a GGUF file written of the same checkpoint."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.arm import Limits, Prompts, Rival, Sample, Setting, up_to_end
from benchmarks.gguf_file import DTYPES, write_gguf
from nudging.models.registry import read_config


@dataclass(frozen=True)
class LlamaCppArm:
    """Greedy generation by `model`; `open(logits_all)` opens one of the same file and settings."""

    name: str
    open: Callable[[bool], Any]
    model: Any
    eos_ids: frozenset[int]
    text: None = None

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        began = time.perf_counter()
        # What it keeps of the last prompt would be read again for nothing.
        self.model.reset()
        tokens = islice(self.model.generate(prompts["base"], temp=0.0), limits.max_tokens)
        token_ids = up_to_end(tokens, self.eos_ids, limits)
        return Sample(token_ids, time.perf_counter() - began)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        model = self.open(True)
        rows = []
        for token_ids in texts:
            model.reset()
            model.eval(list(token_ids))
            rows.append(torch.from_numpy(model.scores[: len(token_ids)].copy()))
        model.close()
        return rows


def llama_cpp_arms(setting: Setting, wanted: Callable[[str], bool]) -> list[Rival]:
    """The base alone in bf16 and in fp32, with what was fastest: flash attention, and the file mapped into
    memory.
    """
    llama: Any = importlib.import_module("llama_cpp")
    config = read_config(setting.base)

    def opener(path: Path) -> Callable[[bool], Any]:
        return lambda logits_all: llama.Llama(
            str(path),
            n_ctx=config.max_len,
            n_threads=setting.threads,
            n_threads_batch=setting.threads,
            flash_attn=True,
            logits_all=logits_all,
            verbose=False,
        )

    arms: list[Rival] = []
    for dtype in DTYPES:
        name = f"llama.cpp {dtype}"
        if wanted(name):
            path = setting.folder / f"base-{dtype}.gguf"
            write_gguf(setting.base, path, dtype)
            open_model = opener(path)
            arms.append(LlamaCppArm(name, open_model, open_model(False), frozenset(config.eos_token_ids)))
    return arms
