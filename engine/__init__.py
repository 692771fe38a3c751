"""nudging: several language models write one text together, on one device, exactly and fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nudging.api.async_generation import AsyncGeneration
    from nudging.api.async_handle import AsyncHandle, AsyncStream
    from nudging.api.async_llm import AsyncLLM
    from nudging.api.generation import Generation
    from nudging.api.handle import Handle, Stream
    from nudging.api.llm import LLM
    from nudging.api.loading import LoadedModel
    from nudging.api.outputs import CompletionOutput, Delta, PromptOutput, RequestOutput, Segment, Stats
    from nudging.core.request_options import RequestOptions
    from nudging.core.sampling_params import SamplingParams
    from nudging.core.stats import EngineStats
    from nudging.errors import (
        BadRequest,
        CheckpointError,
        DeadlineExceeded,
        EngineClosed,
        NudgingError,
        NumericalError,
        OutOfBlocks,
    )
    from nudging.executor.sampler import TokenLogprob
    from nudging.policies import Base, Guide, Nudging, Policy, Step, View

    __version__: str

# Looked up on first use: `import nudging` and `nudging --help` load no torch.
HOMES = {
    "AsyncLLM": "aio",
    "AsyncGeneration": "aio_generation",
    "AsyncHandle": "aio_handle",
    "AsyncStream": "aio_handle",
    "LLM": "api",
    "TokenLogprob": "decide",
    "BadRequest": "errors",
    "CheckpointError": "errors",
    "DeadlineExceeded": "errors",
    "EngineClosed": "errors",
    "NudgingError": "errors",
    "NumericalError": "errors",
    "OutOfBlocks": "errors",
    "Generation": "generation",
    "Handle": "handle",
    "Stream": "handle",
    "LoadedModel": "loading",
    "CompletionOutput": "output",
    "Delta": "output",
    "PromptOutput": "output",
    "RequestOutput": "output",
    "Segment": "output",
    "Stats": "output",
    "SamplingParams": "params",
    "Base": "policies",
    "Guide": "policies",
    "Nudging": "policies",
    "Policy": "policies",
    "Step": "policies",
    "View": "policies",
    "RequestOptions": "request_options",
    "EngineStats": "totals",
}

__all__ = [
    "AsyncGeneration",
    "AsyncHandle",
    "AsyncLLM",
    "AsyncStream",
    "BadRequest",
    "Base",
    "CheckpointError",
    "CompletionOutput",
    "DeadlineExceeded",
    "Delta",
    "EngineClosed",
    "EngineStats",
    "Generation",
    "Guide",
    "Handle",
    "LLM",
    "LoadedModel",
    "Nudging",
    "NudgingError",
    "NumericalError",
    "OutOfBlocks",
    "Policy",
    "PromptOutput",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "Segment",
    "Stats",
    "Step",
    "Stream",
    "TokenLogprob",
    "View",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nudging")
    if name not in HOMES:
        raise AttributeError(f"module 'nudging' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nudging.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
