"""Shared fixtures: a random pair of checkpoints on which both sides of a threshold occur, and the engine
on it.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nudging import LLM
from tests.support import interpreter
from tests.support.tiny import write_tiny_checkpoint

# Before a test imports a kernel.
interpreter.install()

# The same examples in every run, however long it takes to make them.  A machine with a GPU may lack
# hypothesis: its tests need none.
with suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("same")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random base (Llama) and a smaller random guide (Qwen3) with one tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    eos = tuple(range(40, 52))
    base = write_tiny_checkpoint(root / "base", "llama", seed=1, eos=(1, *eos[:6]))
    guide = write_tiny_checkpoint(root / "guide", "qwen3", seed=2, hidden_size=32, eos=eos)
    return {"base": base, "guide": guide}


@pytest.fixture(scope="module")
def tiny_llm(tiny_pair: dict[str, Path]) -> Iterator[LLM]:
    with LLM(**tiny_pair, kv_cache_memory="8MiB") as llm:
        for runner in llm._engine.runners.values():
            runner.poison()
        yield llm


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads that compute, for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
