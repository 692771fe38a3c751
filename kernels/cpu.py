"""What the C++ implementations of all ops share: where they run, on which instruction set and threads."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nudging import _C

from .check import require, sizes

__all__ = ["BEST", "DTYPES", "choose_isa", "on_cpu", "require", "sizes"]

DTYPES = {torch.float32: _C.DType.f32, torch.bfloat16: _C.DType.bf16, torch.float16: _C.DType.f16}


def choose_isa(wanted: str) -> _C.Isa:
    """The instruction set of that name, the best one for ""; ValueError if this machine lacks it."""
    isas = {isa.name: isa for isa in _C.available_isas()}
    if wanted and wanted not in isas:
        raise ValueError(f"NUDGING_ISA is {wanted!r}; this processor and build have {', '.join(isas)}")
    return isas[wanted] if wanted else next(iter(isas.values()))


# Debugging only: NUDGING_ISA = portable, avx2, avx512 or avx512bf16 takes another set than the best.
BEST = choose_isa(os.environ.get("NUDGING_ISA", ""))


class _Teams(threading.local):
    """A thread's own: the team that it chose, and the one of torch's number of threads."""

    chosen: _C.Team | None = None
    default: _C.Team | None = None


_teams = _Teams()


@contextmanager
def use_team(team: _C.Team) -> Iterator[None]:
    """Ops that this thread calls inside run on `team`, which may serve one call at a time."""
    before, _teams.chosen = _teams.chosen, team
    try:
        yield
    finally:
        _teams.chosen = before


def team() -> _C.Team:
    """The threads for the calling thread's next op: those of `use_team`, else as many as torch would use."""
    if _teams.chosen is not None:
        return _teams.chosen
    threads = torch.get_num_threads()
    if _teams.default is None or _teams.default.threads != threads:
        _teams.default = _C.Team(threads)
    return _teams.default


def on_cpu(x: Tensor) -> bool:
    """Whether the C++ kernels take `x`: a CPU tensor of fp32, bf16 or fp16."""
    return x.is_cpu and x.dtype in DTYPES
