"""transformers: the same checkpoints through `generate`, alone and with the guide as its assistant."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms.arm import Limits, Prompts, Rival, Sample, Setting, up_to_end
from nudging.models.registry import read_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TransformersArm:
    """Greedy `generate` of the base; `assistant` drafts for it where there is one."""

    name: str
    model: Any
    eos_ids: frozenset[int]
    assistant: Any = None
    text: None = None

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        ids = torch.tensor([prompts["base"]], device=self.model.device)
        options: dict[str, Any] = {"max_new_tokens": limits.max_tokens, "do_sample": False}
        if limits.ignore_eos:
            options["eos_token_id"] = None
        if self.assistant is not None:
            options["assistant_model"] = self.assistant
        began = time.perf_counter()
        with torch.inference_mode():
            written = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            token_ids = written[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - began
        return Sample(up_to_end(token_ids, self.eos_ids, limits), seconds)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        device = self.model.device
        with torch.inference_mode():
            rows = [self.model(torch.tensor([ids], device=device)).logits[0] for ids in texts]
        return [r.float().cpu() for r in rows]


def transformers_arms(setting: Setting, wanted: Callable[[str], bool]) -> list[Rival]:
    """The base alone in bf16 and in fp32, and assisted by the guide in bf16."""
    transformers: Any = importlib.import_module("transformers")
    # Its warnings and bars would be printed into ours.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load(path: Path, dtype: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
        model.generation_config.pad_token_id = 0
        return model.to(setting.device).eval()

    eos_ids = frozenset(read_config(setting.base).eos_token_ids)
    arms: list[Rival] = []
    for dtype in DTYPES:
        alone, assisted = f"transformers {dtype}", f"transformers {dtype} assisted"
        with_guide = dtype == "bf16" and wanted(assisted)
        if wanted(alone) or with_guide:
            model = load(setting.base, dtype)
            arms += [TransformersArm(alone, model, eos_ids)] if wanted(alone) else []
            arms += (
                [TransformersArm(assisted, model, eos_ids, load(setting.guide, dtype))] if with_guide else []
            )
    return arms
