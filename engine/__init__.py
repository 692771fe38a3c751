"""nudging: several language models write one text together, on one device, exactly and fast."""

import importlib
from typing import Any

# Looked up on first use: `import nudging` and `nudging --help` load no torch.  Types are in __init__.pyi.
HOMES = {
    "api.async_generation": "AsyncGeneration",
    "api.async_handle": "AsyncHandle AsyncStream",
    "api.async_llm": "AsyncLLM",
    "api.generation": "Generation",
    "api.handle": "Handle Stream",
    "api.llm": "LLM",
    "api.loading": "LoadedModel",
    "api.outputs": "CompletionOutput Delta PromptOutput RequestOutput Segment Stats",
    "core.rows": "TokenLogprob",
    "core.request_options": "RequestOptions",
    "core.sampling_params": "SamplingParams",
    "core.stats": "EngineStats",
    "errors": "BadRequest CheckpointError DeadlineExceeded EngineClosed NudgingError NumericalError "
    "OutOfBlocks",
    "policies": "Base Guide Nudging Policy Step View",
}
_HOME_OF = {name: home for home, names in HOMES.items() for name in names.split()}

__all__ = sorted([*_HOME_OF, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("nudging")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nudging' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nudging.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
