"""OpenVINO: the base through openvino-genai, from a folder that optimum-cli made of the same checkpoint."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.arms.arm import Limits, Prompts, Rival, Sample, Setting, up_to_end
from nudging.models.registry import read_config

# By arm: what it computes in. The weights are read as the folder has them, bf16 of a bf16 checkpoint.
PRECISIONS = {"openvino bf16": "bf16", "openvino bf16 in fp32": "f32"}


@dataclass(frozen=True)
class OpenVinoArm:
    """Greedy generation by `pipeline`, which was opened on `folder` with `properties`."""

    name: str
    folder: Path
    properties: Mapping[str, Any]
    pipeline: Any
    eos_ids: frozenset[int]
    text: None = None

    def run(self, prompts: Prompts, limits: Limits) -> Sample:
        genai: Any = importlib.import_module("openvino_genai")
        openvino: Any = importlib.import_module("openvino")
        ids = np.array([prompts["base"]], dtype=np.int64)
        options = self.pipeline.get_generation_config()
        options.max_new_tokens = limits.max_tokens
        options.ignore_eos = limits.ignore_eos
        options.do_sample = False
        began = time.perf_counter()
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        token_ids = self.pipeline.generate(inputs, options).tokens[0]
        seconds = time.perf_counter() - began
        return Sample(up_to_end(token_ids, self.eos_ids, limits), seconds)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        openvino: Any = importlib.import_module("openvino")
        model = openvino.Core().compile_model(
            self.folder / "openvino_model.xml", "CPU", dict(self.properties)
        )
        wanted = {port.get_any_name() for port in model.inputs}
        rows = []
        for token_ids in texts:
            ids = np.array([token_ids], dtype=np.int64)
            everything = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            # A request of its own has a cache of its own.
            request = model.create_infer_request()
            answer = request.infer({name: value for name, value in everything.items() if name in wanted})
            rows.append(torch.from_numpy(answer["logits"][0].copy()))
        return rows


def openvino_arms(setting: Setting, wanted: Callable[[str], bool]) -> list[Rival]:
    """The base alone, computing in bf16, and in fp32 with the same weights, which some processors prefer."""
    assert setting.openvino_ir is not None
    genai: Any = importlib.import_module("openvino_genai")
    eos_ids = frozenset(read_config(setting.base).eos_token_ids)
    arms: list[Rival] = []
    for name, precision in PRECISIONS.items():
        if wanted(name):
            properties = {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": setting.threads,
                "PERFORMANCE_HINT": "LATENCY",
            }
            pipeline = genai.LLMPipeline(str(setting.openvino_ir), "CPU", **properties)
            arms.append(OpenVinoArm(name, setting.openvino_ir, properties, pipeline, eos_ids))
    return arms
