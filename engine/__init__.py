"""nudging: several language models write one text together, on one device, exactly and fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nudging.aio import AsyncLLM
    from nudging.api import LLM
    from nudging.errors import (
        BadRequest,
        CheckpointError,
        DeadlineExceeded,
        EngineClosed,
        NudgingError,
        NumericalError,
        OutOfBlocks,
    )
    from nudging.generation import Generation
    from nudging.loading import LoadedModel
    from nudging.params import SamplingParams
    from nudging.policies import Base, Guide, Nudging

# Looked up on first use: `import nudging` and `nudging --help` load no torch.
HOMES = {
    "AsyncLLM": "aio",
    "LLM": "api",
    "BadRequest": "errors",
    "CheckpointError": "errors",
    "DeadlineExceeded": "errors",
    "EngineClosed": "errors",
    "NudgingError": "errors",
    "NumericalError": "errors",
    "OutOfBlocks": "errors",
    "Generation": "generation",
    "LoadedModel": "loading",
    "SamplingParams": "params",
    "Base": "policies",
    "Guide": "policies",
    "Nudging": "policies",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BadRequest",
    "Base",
    "CheckpointError",
    "DeadlineExceeded",
    "EngineClosed",
    "Generation",
    "Guide",
    "LoadedModel",
    "Nudging",
    "NudgingError",
    "NumericalError",
    "OutOfBlocks",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'nudging' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nudging.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
