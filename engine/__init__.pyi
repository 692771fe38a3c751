"""What type checkers and editors see of `import nudging`: its names are looked up on first use."""

from nudging.api.async_generation import AsyncGeneration
from nudging.api.async_handle import AsyncHandle, AsyncStream
from nudging.api.async_llm import AsyncLLM
from nudging.api.generation import Generation
from nudging.api.handle import Handle, Stream
from nudging.api.llm import LLM
from nudging.api.loading import LoadedModel
from nudging.api.outputs import CompletionOutput, Delta, PromptOutput, RequestOutput, Segment, Stats
from nudging.core.request_options import RequestOptions
from nudging.core.rows import TokenLogprob
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
from nudging.policies import Base, Guide, Nudging, Policy, Step, View

__version__: str

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

def __dir__() -> list[str]: ...
