"""What only a GPU can show."""

from pathlib import Path

import pytest
import torch

from nudging import LLM, Nudging, SamplingParams
from tests.pairs import written

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


def test_fp32_text_on_the_gpu_is_the_cpus(tiny_pair: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [[60 + i, 70, 80] for i in range(4)]
    outputs = []
    for device in ("cpu", "cuda"):
        with LLM(**tiny_pair, device=device, kv_cache_memory="4MiB") as llm:
            results = llm.generate(prompts, params, Nudging(0.4, "token"))
            outputs.append([written(result.outputs[0]) for result in results])
    assert outputs[0] == outputs[1]
