"""`LLM`: open models, generate, stream, submit, score.  Owns the engine's thread and nothing global."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from nudging.api.arguments import (
    Speculate,
    check_file,
    check_flags,
    check_sizes,
    name_roles,
    read_drafter,
    read_speculate,
    read_templates,
)
from nudging.api.generation import Generation, scores
from nudging.api.handle import Handle, Owned, Stream
from nudging.api.jobs import Jobs, read_policy
from nudging.api.llm_options import LLMOptions
from nudging.api.loading import (
    Checkpoint,
    describe_models,
    load_roles,
    make_runners,
    read_bytes,
    read_device,
    read_dtype,
    read_quantization,
    read_threads,
)
from nudging.api.outputs import RequestOutput
from nudging.api.scores import pair_up
from nudging.api.watched import Watched
from nudging.checks import called_like, strict_call
from nudging.core.engine import Engine
from nudging.core.engine_thread import EngineThread
from nudging.core.request_options import (
    ChatOptions,
    RequestOptions,
    SubmitOptions,
    read_request_options,
    read_seconds,
)
from nudging.core.sampling_params import SamplingParams
from nudging.core.trace import Trace, Tracer
from nudging.executor.flash_prefill import check_prefill_attention, read_prefill_attention
from nudging.policies.protocol import Policy
from nudging.text.prompts import Messages, Prompt, read_prompt
from nudging.text.role_tokenizer import find_role

POCKET = {"base": "pocket:base", "guide": "pocket:guide", "kv_cache_memory": "64MiB"}


class LLM(Watched):
    """A base model, an optional guide and further roles, on one device, in one engine.

    `base`, `guide` and the values of `models` are a checkpoint's directory, a hub id, `pocket:NAME` or a
    LoadedModel; equal ones share their weights.  `kv_cache_memory`: bytes for the caches of all models
    together.  `dtype`: "auto" is each checkpoint's own.  `quantization`: "int8" keeps all weights of matrix
    products as int8 with a scale for each output channel, another precision at half the memory traffic of 16
    bits.  `threads`: of the ops on the CPU, torch's number by default; changes no token.  `speculate`: how
    many tokens are drafted for every pass of the base; "auto" drafts as many as pay, "off" none.
    `drafter`: "guide" drafts with the guide where the policy has one, "ngram" looks up what followed the
    text's last tokens before (also for one model alone), "none" never drafts.  Both change speed, never a
    token.  `max_len`: the longest prompt + text in tokens, where a checkpoint's own context is longer.
    `max_batch_tokens`: the most tokens of one pass, longer prompts are read in parts.  Use as a context
    manager or call `close()`: then every request has ended and all memory is free.  `prefix_caching`: the
    cache of computed tokens stays until its memory is needed, for requests that begin alike (see `cache_salt`
    of RequestOptions).  `progress`: a bar while weights load; None shows it where stderr is a terminal.
    `chat_template`: how chats are written, for all roles or by role: a Jinja source, or the name of one of
    the checkpoint's templates; None is the checkpoint's own, or without one the plain form of questions and
    answers (`roles[...].template` shows it).  `revision`: branch, tag or commit of a hub id, by role where
    several have one.  `trace`: a file for a timeline of all steps, for Perfetto or chrome://tracing.
    `prefill_attention`: "flash-attn" reads prompts with that package where it is installed (bf16 or fp16 on a
    CUDA GPU; flash-attn 3 takes a `block_size` below 64, flash-attn 2 a multiple of 256).  Then the bits of
    rows that were computed more than 16 at a time for their text depend on how many, so a text is no longer
    promised to be the same under other chunks of its prompt, prefix-cache hits, preemption or neighbours;
    `stats().precision` says so.  `record_ahead`: on a GPU, while there is nothing to do, passes are recorded
    for more requests at once and for longer texts than there have been; a request that comes waits for one
    recording at most.  False where other threads of the process use the GPU: CUDA lets nobody wait for a
    whole device while something is recorded on it.  Raises BadRequest, CheckpointError and OSError.
    """

    @strict_call("LLM")
    def __init__(
        self,
        base: Checkpoint,
        guide: Checkpoint | None = None,
        *,
        models: Mapping[str, Checkpoint] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        threads: int | None = None,
        kv_cache_memory: int | str = "1GiB",
        speculate: Speculate = "auto",
        drafter: str = "guide",
        max_batch_tokens: int = 2048,
        block_size: int = 16,
        max_len: int | None = None,
        prefix_caching: bool = True,
        prefill_attention: str = "nudging",
        record_ahead: bool = True,
        progress: bool | None = None,
        trace: str | os.PathLike[str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        revision: str | Mapping[str, str] | None = None,
    ) -> None:
        check_sizes(max_batch_tokens=max_batch_tokens, block_size=block_size, max_len=max_len)
        check_flags(prefix_caching=prefix_caching, record_ahead=record_ahead, progress=progress)
        check_file("trace", trace)
        memory = read_bytes(kv_cache_memory)
        draft_len, drafter = read_speculate(speculate), read_drafter(drafter)
        checkpoints = name_roles(base, guide, models)
        templates = read_templates(chat_template, checkpoints)
        shown = sys.stderr.isatty() if progress is None else progress
        where = read_device(device)
        flash = read_prefill_attention(prefill_attention, where, block_size)
        num_threads, quantized = read_threads(threads), read_quantization(quantization)
        how = read_dtype(dtype), where, shown, max_len, quantized, templates, revision
        self.roles, decoders = load_roles(checkpoints, *how)
        check_prefill_attention(flash, decoders.values())
        runners = make_runners(decoders, self.roles, memory, block_size, prefix_caching, num_threads, flash)
        tracer = Tracer() if trace is None else Trace(open(trace, "w"))  # noqa: SIM115 - closed with the tracer
        models_of = {role.name: role.model for role in self.roles.values()}
        self._engine = Engine(runners, models_of, max_batch_tokens, tracer=tracer)
        self._thread = EngineThread(self._engine, record_ahead, self._engine.close)
        self._described = describe_models(checkpoints, self.roles, runners)
        self._jobs = Jobs(self._engine, self._thread, self.roles, draft_len, drafter)

    @classmethod
    @strict_call("LLM.pocket")
    @called_like(__init__, **POCKET)
    def pocket(
        cls,
        base: Checkpoint = "pocket:base",
        guide: Checkpoint | None = "pocket:guide",
        **options: Unpack[LLMOptions],
    ) -> Self:
        """The shipped pair: a small base that was never aligned and a smaller guide that was; with the
        options of `LLM`, and less memory for the caches.
        """
        options.setdefault("kv_cache_memory", POCKET["kv_cache_memory"])
        return cls(base, guide, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every request with "abort", stop the engine's thread and free all memory.  May be called
        twice.
        """
        self._thread.close()

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests and wait until those that are there have ended; then `close()`.

        Raises TimeoutError after `timeout` seconds; what runs goes on.
        """
        self._thread.drain(read_seconds("timeout", timeout))

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> list[RequestOutput]:
        """Continue every prompt; the results are in the prompts' order.

        A prompt is a str, a list of token ids or a dict of either per role.  Parameters and policy are
        one for all or one for each; `options` are those of RequestOptions.  Raises BadRequest before
        anything runs when any of them cannot be served.
        """
        self._thread.check_may_wait("generate()")
        with Owned() as handles:
            self._jobs.start_prompts(prompts, sampling_params, policy, speculate, options, handles)
            return handles.results()

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer conversations ({"role", "content"} dicts), each written in every role's own template.

        `options` are those of ChatOptions.  A role whose checkpoint has no template reads "Question: ..." and
        "Answer: ..." (`LLM(chat_template=...)` sets another form).
        """
        self._thread.check_may_wait("chat()")
        with Owned() as handles:
            self._jobs.start_chats(messages, sampling_params, policy, speculate, options, handles)
            return handles.results()

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Stream:
        """The text as it is written: an iterator of deltas, with `request_id`, `handle` and `cancel()`.

        Bad arguments are refused at once.  Leaving it early cancels the request.
        """
        with Owned() as handles:
            self._jobs.start_prompt(prompt, sampling_params, policy, speculate, options, handles)
            return Stream(handles[0])

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """Like `stream`, for a conversation."""
        with Owned() as handles:
            self._jobs.start_chat(messages, sampling_params, policy, speculate, options, handles)
            return Stream(handles[0])

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Handle:
        """Start one prompt and return at once; callable from any thread.  Raises BadRequest, EngineClosed."""
        handles = Owned()
        try:
            self._jobs.start_prompt(prompt, sampling_params, policy, speculate, options, handles)
            return handles[0]
        except BaseException:
            handles.cancel()
            raise

    def submit_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        policy: Policy | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> Handle:
        """Like `submit`, for a conversation; `options` are those of ChatOptions."""
        handles = Owned()
        try:
            self._jobs.start_chat(messages, sampling_params, policy, speculate, options, handles)
            return handles[0]
        except BaseException:
            handles.cancel()
            raise

    def submit_all(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[SubmitOptions],
    ) -> list[Handle]:
        """`generate` without the waiting: all prompts are checked, then all are started."""
        handles = Owned()
        try:
            self._jobs.start_prompts(prompts, sampling_params, policy, speculate, options, handles)
            return handles
        except BaseException:
            handles.cancel()
            raise

    def submit_chats(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        policy: Policy | Iterable[Policy | None] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Handle]:
        """`chat` without the waiting: all conversations are checked, then all are started."""
        handles = Owned()
        try:
            self._jobs.start_chats(messages, sampling_params, policy, speculate, options, handles)
            return handles
        except BaseException:
            handles.cancel()
            raise

    def open(
        self, prompt: Prompt, policy: Policy | None = None, **options: Unpack[RequestOptions]
    ) -> Generation:
        """A text to be extended, forked, rewound and scored, with the cache of every role kept between
        calls; `options` hold for each call.
        """
        self._thread.check_open()
        read_options = read_request_options(options)
        policy = read_policy(policy, self.roles)
        prompts = read_prompt(prompt, [self.roles[name] for name in policy.roles], self.roles)
        return Generation(self._engine, self._thread, self.roles, policy, prompts, read_options)

    def logits(self, role: str, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """What `role` says after each prefix of `token_ids`: float32 [len(token_ids), vocab]."""
        return self._thread.call(self._logits(role, token_ids))

    def _logits(self, role: str, token_ids: Iterable[int]) -> Callable[[], NDArray[np.float32]]:
        """`logits`, for the engine's thread."""
        self._thread.check_open()
        found = find_role(self.roles, role)
        ids = read_prompt(token_ids, [found])[found.name].ids

        def read() -> NDArray[np.float32]:
            rows: NDArray[np.float32] = self._engine.runners[found.model].logits(ids).numpy()
            return rows

        return read

    @overload
    def score(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        continuation: str | Iterable[int],
        policy: Policy | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[float]: ...
    @overload
    def score(
        self,
        prompt: Prompt | Iterable[Prompt],
        continuation: str | Iterable[str] | Iterable[Iterable[int]],
        policy: Policy | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[list[float]]: ...
    def score(
        self,
        prompt: Any,
        continuation: Any,
        policy: Policy | None = None,
        **options: Unpack[RequestOptions],
    ) -> Any:
        """The log-probability of each token of `continuation` after `prompt`, under the policy.

        Several continuations, of one prompt or each of its own, are read together and give a list for each.
        A token counts under the role that owns its position.  Raises BadRequest before anything runs, then
        the error that a request ended with.
        """
        self._thread.check_may_wait("score()")
        pairs, are_several = pair_up(prompt, continuation)
        with Owned() as handles:
            self._jobs.start_scores(pairs, policy, options, handles)
            found = [scores(result) for result in handles.results()]
        return found if are_several else found[0]
