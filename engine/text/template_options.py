"""What a caller may say of how a conversation becomes a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class TemplateOptions(TypedDict, total=False):
    """Arguments of transformers' `apply_chat_template`, with their meaning there.

    `tools`: JSON schemas; `documents`: objects with title and text; `add_generation_prompt`: the prompt ends
    where the assistant's next turn begins, True unless `continue_final_message`, with which the last message
    goes on (a str names its field, else "content"); `chat_template`: a Jinja source, or the name of one of
    the checkpoint's templates, for all roles or by role; `chat_template_kwargs`: further variables of the
    template such as enable_thinking.  What a template does not read has no effect there.
    """

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | str | None
    chat_template: str | Mapping[str, str] | None
    chat_template_kwargs: Mapping[str, Any] | None
