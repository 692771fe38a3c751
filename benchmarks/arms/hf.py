"""transformers: the same checkpoints through `generate`, alone and with the guide as its assistant."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms.arm import Arm, Limits, Prompts, Sample

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TransformersArm:
    """Greedy `generate` of the base; `assistant` drafts for it where there is one."""

    name: str
    model: Any
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
        return Sample(tuple(token_ids), time.perf_counter() - began)


def transformers_arms(base: Path, guide: Path, device: torch.device, dtypes: list[str]) -> list[Arm]:
    """The base alone in each of `dtypes` ("bf16", "fp32"), and assisted by the guide in the first of them."""
    transformers: Any = importlib.import_module("transformers")
    # Its warnings and bars would be printed into ours.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load(path: Path, dtype: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).to(device).eval()
        model.generation_config.pad_token_id = 0
        return model

    models = {dtype: load(base, dtype) for dtype in dtypes}
    arms: list[Arm] = [TransformersArm(f"transformers {dtype}", model) for dtype, model in models.items()]
    first = dtypes[0]
    arms.append(TransformersArm(f"transformers {first} assisted", models[first], load(guide, first)))
    return arms
