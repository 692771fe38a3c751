"""Given continuations and what they score."""

from __future__ import annotations

from typing import Any

from nudging.errors import BadRequest
from nudging.text.prompts import list_continuations, list_prompts


def pair_up(prompt: Any, continuation: Any) -> tuple[list[tuple[Any, Any]], bool]:
    """Every continuation with its prompt, and whether there may be several.  Raises BadRequest.

    One prompt stands before each of several continuations; several prompts take one each, or all the same.
    """
    prompts, several_prompts = list_prompts(prompt)
    continuations, several_continuations = list_continuations(continuation)
    if not prompts:
        raise BadRequest("the prompt is empty; give at least one character or one token id")
    if not several_prompts:
        return [(prompts[0], one) for one in continuations], several_continuations
    if not several_continuations:
        continuations *= len(prompts)
    if len(continuations) != len(prompts):
        raise BadRequest(
            f"there are {len(prompts)} prompts and {len(continuations)} continuations; give one for all, or "
            "one for each"
        )
    return list(zip(prompts, continuations, strict=True)), True
