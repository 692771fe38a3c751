"""An op is its reference, a readable function; implementations register under it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

from torch.cuda import device_of

P = ParamSpec("P")
R = TypeVar("R")

# Debugging only: `reference` runs every op's definition, whatever else could run.
FORCED = os.environ.get("NUDGING_KERNELS", "")


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One way to run an op, with the predicate on device, dtype and shape that says where it may run."""

    name: str
    runs_on: Callable[P, bool]
    run: Callable[P, R]


class Op(Generic[P, R]):
    """Callable like its reference; the first registered implementation that `runs_on` the arguments runs."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.implementations: list[Implementation[P, R]] = []
        self._allowed: list[Implementation[P, R]] = []

    def impl(self, name: str, runs_on: Callable[P, bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as the implementation `name`, used where `runs_on(*args)` holds."""

        def register(run: Callable[P, R]) -> Callable[P, R]:
            made = Implementation(name, runs_on, run)
            self.implementations.append(made)
            if FORCED in ("", name):
                self._allowed.append(made)
            return run

        return register

    def impl_at(self, name: str, runs_on: Callable[P, bool], at: str) -> None:
        """Register the function `at`, a "module:function" that is imported when it first runs, likewise.

        It runs with the device of its first argument, a tensor, as the current one: Triton launches there.
        """
        module, _, function = at.partition(":")

        @functools.cache
        def found() -> Callable[P, R]:
            run: Callable[P, R] = getattr(importlib.import_module(module), function)
            return run

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with device_of(args[0]):  # type: ignore[no-untyped-call]
                return found()(*args, **kwargs)

        self.impl(name, runs_on)(run)

    def chosen(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The name of the implementation that would run these arguments."""
        found = self._find(*args, **kwargs)
        return "reference" if found is None else found.name

    def _find(self, *args: P.args, **kwargs: P.kwargs) -> Implementation[P, R] | None:
        for candidate in self._allowed:
            if candidate.runs_on(*args, **kwargs):
                return candidate
        return None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # _find, written out: a decode step of a small model is made of calls.
        for candidate in self._allowed:
            if candidate.runs_on(*args, **kwargs):
                return candidate.run(*args, **kwargs)
        return self.reference(*args, **kwargs)
