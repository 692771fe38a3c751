"""The options of `LLM(...)`, for those who pass them on: named and typed where editors look."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypedDict

import torch

from nudging.api.arguments import Speculate
from nudging.api.loading import Checkpoint


class LLMOptions(TypedDict, total=False):
    """What `LLM` takes beside `base` and `guide`; each is described there."""

    models: Mapping[str, Checkpoint] | None
    device: str | torch.device
    dtype: str | torch.dtype
    quantization: str | None
    threads: int | None
    kv_cache_memory: int | str
    speculate: Speculate
    drafter: str
    max_batch_tokens: int
    block_size: int
    max_len: int | None
    prefix_caching: bool
    prefill_attention: str
    record_ahead: bool
    progress: bool | None
    trace: str | os.PathLike[str] | None
    chat_template: str | Mapping[str, str] | None
    revision: str | Mapping[str, str] | None
