"""How arguments are read at every door: unknown and missing ones by name, None as the default, NumPy's and
torch's values as Python's.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from nudging.errors import BadRequest

C = TypeVar("C", bound=type)
P = ParamSpec("P")
R = TypeVar("R")

# What users of other engines pass by habit, and what it is called here.
HABITS = {
    "model": "base",
    "base_model": "base",
    "guide_model": "guide",
    "max_model_len": "max_len",
    "max_num_batched_tokens": "max_batch_tokens",
    "enable_prefix_caching": "prefix_caching",
    "gpu_memory_utilization": "kv_cache_memory",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "bad_words_ids": "bad_words",
    "top_logprobs": "logprobs",
    "do_sample": "temperature",
}


def unknown_option(owner: str, unknown: Iterable[str], known: Iterable[str]) -> BadRequest:
    """The error for options that nobody has: names them, the nearest known one, and all known ones."""
    known = list(known)
    hints = []
    for name in map(str, unknown):
        habit = HABITS.get(name)
        close = [habit] if habit in known else difflib.get_close_matches(name, known, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return BadRequest(f"{owner} has no option {', '.join(hints)}; it has {', '.join(known)}")


def plain(value: Any) -> Any:
    """NumPy's and torch's values as Python's own, those in a list, tuple, set or map, too: scalars as int,
    float or bool, arrays as lists.

    Anything else comes back as it is.  Raises BadRequest for an array whose values cannot be read.
    """
    if type(value) in (list, tuple, set, frozenset):
        return type(value)([plain(item) for item in value])
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if not (hasattr(value, "shape") and hasattr(value, "tolist")):
        return value
    try:
        return value.tolist()
    except Exception as error:
        raise BadRequest(
            f"a {type(value).__name__} cannot be read ({error}); give plain numbers or a list of them"
        ) from error


def read_arguments(
    owner: str, signature: inspect.Signature, values: tuple[Any, ...], options: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call, in plain values; None stands for the default where it means nothing else.

    Raises BadRequest for arguments that are unknown, missing or too many.
    """
    known = [name for name in signature.parameters if name != "self"]
    try:
        bound = signature.bind(*values, **options)
    except TypeError as error:
        unknown = [name for name in options if name not in known]
        if unknown:
            raise unknown_option(owner, unknown, known) from None
        raise BadRequest(f"{owner}: {error}; it takes {', '.join(known)}") from None
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        means_default = value is None and parameter.default is not inspect.Parameter.empty
        if means_default and "None" not in str(parameter.annotation):
            bound.arguments[name] = parameter.default
        else:
            bound.arguments[name] = plain(value)
    return bound


def strict_call(owner: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that reads its arguments with `read_arguments`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*values: P.args, **options: P.kwargs) -> R:
            bound = read_arguments(owner, signature, values, options)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def strict(cls: C) -> C:
    """A dataclass whose constructor is a `strict_call`."""
    cls.__init__ = strict_call(cls.__name__)(cls.__init__)  # type: ignore[misc]
    return cls


def called_like(model: Callable[..., Any], **defaults: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show a function that passes its options on with the parameters of `model`, some with other defaults."""
    shown = inspect.signature(model)
    parameters = [
        p.replace(default=defaults.get(name, p.default)) if p.kind is not p.VAR_KEYWORD else p
        for name, p in shown.parameters.items()
    ]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        result = inspect.signature(function).return_annotation
        signature = shown.replace(parameters=parameters, return_annotation=result)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


def require(holds: bool, name: str, value: object, limit: str) -> None:
    """Raise BadRequest naming the option, its value and its limit unless `holds`."""
    if not holds:
        raise BadRequest(f"{name} is {value!r}; it must be {limit}")


def is_int(value: object) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for a finite int or float that is not a bool."""
    if not is_int(value) and not isinstance(value, float):
        return False
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        # An int beyond all floats.
        return False


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: a lone surrogate is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
