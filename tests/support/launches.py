"""What a pass launches on a GPU, counted without one: Triton's interpreter runs the ops."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nudging import kernels
from nudging.kernels.op import Implementation, Op


def every_op() -> list[Op[..., Any]]:
    """All ops there are."""
    names = [f"nudging.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return list({id(value): value for value in values if isinstance(value, Op)}.values())


@contextmanager
def triton_runs_all_ops() -> Iterator[None]:
    """Inside, Triton runs every op that it implements, wherever the tensors are."""
    with ExitStack() as stack:
        for op in every_op():
            allowed = [
                Implementation(one.name, lambda *args, **kwargs: True, one.run)
                for one in op.implementations
                if one.name == "triton"
            ]
            stack.enter_context(mock.patch.object(op, "_allowed", allowed))
        yield


class Launches(TorchDispatchMode):
    """Lists what is launched inside: our kernels, and the ops of torch that compute anything."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known, made = (
            {storage(x) for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in (args, out)
        )
        name = func.overloadpacket.__name__
        if (made - known or func._schema.is_mutable) and "empty" not in name:
            self.names.append(name)
        return out

    @contextmanager
    def listening(self) -> Iterator[None]:
        import triton

        kind: Any = type(triton.jit(storage))
        plain = kind.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self.names.append(kernel.fn.__name__)
            with _disable_current_modes():
                plain(kernel, *args, **kwargs)

        with mock.patch.object(kind, "run", run), self:
            yield


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
