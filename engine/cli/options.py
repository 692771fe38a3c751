"""Flags that several commands share, and what is made of them.  Imports nothing heavy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nudging.core.sampling_params import SamplingParams
from nudging.errors import BadRequest

if TYPE_CHECKING:
    from nudging.api.llm import LLM
    from nudging.policies.protocol import Policy

F = TypeVar("F", bound=Callable[..., Any])
Flags = Mapping[str, Any]

option = functools.partial(click.option, show_envvar=True)


class LinesOfText(click.types.StringParamType):
    """Text that may hold spaces: where several are given in one environment variable, one a line."""

    envvar_list_splitter = "\n"


class TokenLimit(click.types.IntParamType):
    """A number of tokens, or "none": as far as the context goes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if str(value).lower() == "none" else super().convert(value, param, ctx)


def shared(*options: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that adds options, shown in this order."""

    def add(command: F) -> F:
        for one in reversed(options):
            command = one(command)
        return command

    return add


model_options = shared(
    option("--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="Of the weights."),
    option(
        "--revision",
        multiple=True,
        metavar="[ROLE=]REVISION",
        help="Branch, tag or commit of a hub id; repeatable where several roles have one.",
    ),
    option("--quantization", metavar="int8", help="Keep the weights of matrix products as int8."),
    option("--threads", type=int, help="Of the ops on the CPU; as many as torch takes by default."),
    option("--device", default="auto", metavar="auto|cpu|cuda|cuda:N", help="Where the models run."),
    option(
        "--kv-cache-memory", default="1GiB", metavar="BYTES", help="For the caches of all models together."
    ),
    option("--max-len", type=int, help="Longest prompt + text in tokens; the checkpoints' own by default."),
    option(
        "--speculate",
        default="auto",
        metavar="auto|off|N",
        help="Tokens drafted ahead for every pass of the base; never changes a token.",
    ),
    option(
        "--chat-template",
        metavar="FILE|NAME",
        help="How chats are written: a file with a Jinja template, or one of the checkpoints' by name.",
    ),
    option(
        "--trace",
        type=click.Path(dir_okay=False, writable=True),
        help="Write a timeline of all steps, for Perfetto or chrome://tracing.",
    ),
    option(
        "--drafter",
        default="guide",
        metavar="guide|ngram|none",
        help="Who drafts: the guide; ngram looks up what stood behind the last tokens before.",
    ),
)

policy_options = shared(
    option(
        "--policy",
        type=click.Choice(["base", "guide", "nudging"]),
        show_default="nudging with a guide, else base",
        help="Who writes.",
    ),
    option(
        "--threshold",
        type=float,
        default=0.4,
        help="nudging: below this top-1 probability of the base, the guide writes.",
    ),
    option(
        "--granularity",
        default="word",
        metavar="word|token|reference",
        help="nudging: how much the guide writes at a time.",
    ),
    option("--comparator", default="<", metavar="<|<=", help="nudging: how the probability compares."),
)

sampling_options = shared(
    option("--temperature", type=float, default=0.0, help="0 is greedy."),
    option(
        "--top-p", type=float, default=1.0, help="Sample from the likeliest tokens with this probability."
    ),
    option("--top-k", type=int, default=0, help="Sample from this many tokens; 0 is all."),
    option(
        "--min-p", type=float, default=0.0, help="Sample from tokens this likely, relative to the top one."
    ),
    option("--seed", type=int, help="Of the noise; without it every run differs."),
    option("--presence-penalty", type=float, default=0.0, help="Off the logits of tokens in the text."),
    option("--frequency-penalty", type=float, default=0.0, help="Likewise, for each time a token is there."),
    option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Makes tokens of prompt and text less likely above 1, likelier below.",
    ),
    option(
        "--bad-word",
        multiple=True,
        type=LinesOfText(),
        help="Never write this; repeatable (in the environment: one a line).",
    ),
    option("--allowed-token-id", multiple=True, type=int, help="Write nothing else; repeatable."),
    option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        help="Add this to a token's logit, -100 to 100; repeatable.",
    ),
)

stop_options = shared(
    option(
        "--stop",
        multiple=True,
        type=LinesOfText(),
        help="End before this text; repeatable (in the environment: one a line).",
    ),
    option("--stop-token-id", multiple=True, type=int, help="End before this token; repeatable."),
    option("--ignore-eos", is_flag=True, help="Write on past the end of a text."),
    option("--min-tokens", type=int, default=0, help="Before so many tokens nothing ends a text."),
    option(
        "--include-stop-str-in-output", is_flag=True, help="The stop string that ends a text is part of it."
    ),
    option(
        "--skip-special-tokens/--no-skip-special-tokens",
        default=True,
        help="Whether special tokens are left out of the text.",
    ),
)


def read_params(flags: Flags) -> SamplingParams:
    """The sampling parameters that the flags name; those a command does not have keep their default."""
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "ignore_eos",
        "logprobs",
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "prompt_logprobs",
    )
    given = {name: flags[name] for name in names if name in flags}
    return SamplingParams(
        **given,
        stop_token_ids=flags.get("stop_token_id", ()),
        bad_words=flags.get("bad_word", ()),
        allowed_token_ids=flags.get("allowed_token_id") or None,
        logit_bias=dict(map(read_bias, flags.get("logit_bias", ()))),
    )


def read_bias(text: str) -> tuple[int, float]:
    """A token id and its bias from ID=BIAS.  Raises BadRequest."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise BadRequest(f"--logit-bias is {text!r}; give ID=BIAS, as in 50256=-100") from None


def read_revision(given: tuple[str, ...]) -> str | dict[str, str] | None:
    """`--revision` as the API takes it."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [text.partition("=") for text in given]
    if not all(separator for _, separator, _ in pairs):
        raise BadRequest(f"--revision is given as {', '.join(given)}; give ROLE=REVISION for each")
    return {role: revision for role, _, revision in pairs} or None


def read_policy(flags: Flags, has_guide: bool) -> Policy:
    """The policy that the flags name, all of them checked.  Raises BadRequest."""
    from nudging.policies import Base, Guide, Nudging

    nudging = Nudging(flags["threshold"], flags["granularity"], flags["comparator"])
    name = flags["policy"] or ("nudging" if has_guide else "base")
    if name != "base" and not has_guide:
        raise BadRequest(f"--policy {name} needs a guide; add --guide, or use --policy base")
    policies: dict[str, Policy] = {"base": Base(), "guide": Guide(), "nudging": nudging}
    return policies[name]


def read_speculate(value: str) -> str | int:
    """`--speculate` as the API takes it, which checks it."""
    return int(value) if value.isdecimal() else value


def read_template(value: str | None) -> str | None:
    """`--chat-template` as the API takes it: a source or a name."""
    return Path(value).read_text(encoding="utf-8") if value and Path(value).is_file() else value


def open_llm(flags: Flags, base: str, guide: str | None, progress: bool) -> LLM:
    """The models that the flags name.  Raises BadRequest, CheckpointError."""
    from nudging.api.llm import LLM

    return LLM(
        base,
        guide,
        dtype=flags["dtype"],
        revision=read_revision(flags["revision"]),
        quantization=flags["quantization"],
        threads=flags["threads"],
        device=flags["device"],
        kv_cache_memory=flags["kv_cache_memory"],
        speculate=read_speculate(flags["speculate"]),
        drafter=flags["drafter"],
        max_len=flags["max_len"],
        chat_template=read_template(flags["chat_template"]),
        progress=progress,
        trace=flags["trace"],
    )
