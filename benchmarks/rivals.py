"""Which other engines are there to be measured, and whether each holds the model that ours holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.arms.arm import Rival, Setting
from benchmarks.arms.hf import transformers_arms
from benchmarks.arms.llama_cpp import llama_cpp_arms
from benchmarks.arms.openvino import openvino_arms
from benchmarks.arms.sglang import sglang_arms
from benchmarks.arms.vllm import vllm_arms
from benchmarks.gguf_file import check_plain_llama
from nudging.errors import BadRequest
from nudging.models.registry import read_config

# Another engine's bf16 kernels decide near-ties otherwise: a token this likely, relative to the likeliest, is
# as good.  A tensor in a wrong place changes nearly all positions, and no rounding as many as 5 %.
NEAR_TIE = 0.8
LEAST_SHARE = 0.95


@dataclass(frozen=True)
class Engine:
    """A rival engine: the packages it needs by the name they are imported by and the one pip knows, and the
    types of devices that it is measured on.
    """

    packages: Mapping[str, str]
    arms: Callable[[Setting, Callable[[str], bool]], list[Rival]]
    devices: tuple[str, ...] = ("cpu",)

    def obstacle(self, setting: Setting) -> str | None:
        """Why it cannot be measured here; None where it can."""
        missing = [pip for module, pip in self.packages.items() if importlib.util.find_spec(module) is None]
        if missing:
            return f"not installed; pip install {' '.join(missing)}"
        if setting.device.type not in self.devices:
            return f"measured on {' and '.join(self.devices)} only, not on {setting.device}"
        return None


class LlamaCpp(Engine):
    """It reads GGUF files, and those of plain Llamas are all that are written here."""

    def obstacle(self, setting: Setting) -> str | None:
        try:
            check_plain_llama(read_config(setting.base))
        except BadRequest as error:
            return str(error)
        return super().obstacle(setting)


class OpenVino(Engine):
    """It reads a folder that its exporter wrote."""

    def obstacle(self, setting: Setting) -> str | None:
        missing = super().obstacle(setting)
        if missing is None and setting.openvino_ir is None:
            return "export the base (benchmarks/README.md) and give the folder with --openvino-ir"
        return missing


ENGINES: dict[str, Engine] = {
    "transformers": Engine({"transformers": "transformers"}, transformers_arms, ("cpu", "cuda")),
    "llama.cpp": LlamaCpp({"gguf": "gguf", "llama_cpp": "llama-cpp-python"}, llama_cpp_arms),
    "openvino": OpenVino({"openvino_genai": "openvino-genai"}, openvino_arms),
    "vllm": Engine({"vllm": "vllm"}, vllm_arms, ("cuda",)),
    "sglang": Engine({"sglang": "sglang"}, sglang_arms, ("cuda",)),
}


def open_rivals(setting: Setting, wanted: Callable[[str], bool]) -> tuple[list[Rival], dict[str, str]]:
    """The arms of every engine that are `wanted` by name; for engines that cannot be run, the reason."""
    arms: list[Rival] = []
    left_out: dict[str, str] = {}
    for name, engine in ENGINES.items():
        obstacle = engine.obstacle(setting)
        if obstacle is None:
            arms += engine.arms(setting, wanted)
        else:
            left_out[name] = obstacle
    return arms, left_out


@dataclass(frozen=True)
class Likeness:
    """How near a rival's base is to ours: the share of positions with the same likeliest token, and the
    largest difference of any token's probability.
    """

    argmax: float
    probability: float


class DifferentModel(AssertionError):
    """A rival holds another model than ours."""


def likeness(rival: Rival, texts: Sequence[Sequence[int]], ours: Sequence[Tensor]) -> Likeness:
    """Compare what the rival says after every token of `texts` with `ours`, [n, vocab] for each text.

    Raises DifferentModel where at more than 5 % of the positions our likeliest token is far from the rival's.
    """
    same: list[bool] = []
    near: list[bool] = []
    largest = 0.0
    for theirs, mine in zip(rival.logits(texts), ours, strict=True):
        if theirs.shape != mine.shape:
            raise DifferentModel(f"{rival.name} gives logits {list(theirs.shape)}, ours {list(mine.shape)}")
        probabilities, choice = torch.softmax(theirs, -1), mine.argmax(-1)
        same += (probabilities.argmax(-1) == choice).tolist()
        of_choice = probabilities.gather(-1, choice[:, None])[:, 0]
        near += (of_choice >= NEAR_TIE * probabilities.amax(-1)).tolist()
        largest = max(largest, float((probabilities - torch.softmax(mine, -1)).abs().max()))
    if sum(near) < LEAST_SHARE * len(near):
        raise DifferentModel(
            f"{rival.name} finds our likeliest token likeliest, or nearly, at {sum(near)} of {len(near)} "
            f"positions; one model does at {LEAST_SHARE:.0%}; was its file made of this checkpoint?"
        )
    return Likeness(sum(same) / len(same), largest)
