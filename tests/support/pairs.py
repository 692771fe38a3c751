"""Engines and oracles over the same models: what the exactness tests compare."""

import codecs
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.api.outputs import CompletionOutput, RequestOutput
from nudging.core.engine_loop import Order
from nudging.core.rows import TokenLogprob
from nudging.executor.sampler import logprob_of
from nudging.policies import Policy
from nudging.text.tokenizer import Tokenizer
from tests.support import oracle

PROMPT = "How many apples are left?"


class Outcome(NamedTuple):
    """All that a job comes to: tokens, authors and end, the text, and log-probabilities where asked for."""

    written: oracle.Written
    text: str
    logprobs: tuple[TokenLogprob | None, ...] | None


class Twin:
    """The straight-line twin of an open LLM: the same weights, read anew for every token."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._memo: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def last_row(self, role: str) -> Callable[[list[int]], Tensor]:
        decoder = self.llm._engine.runners[self.llm.roles[role].model].decoder

        def logits(ids: list[int]) -> Tensor:
            key = (role, tuple(ids))
            if key not in self._memo:
                self._memo[key] = decoder.logits(ids)[-1]
            return self._memo[key]

        return logits

    def generate(self, prompt: object, params: SamplingParams, policy: Policy) -> oracle.Written:
        """What the engine must write for token ids; one list for all roles or one for each."""
        roles = {}
        for name in policy.roles:
            ids = prompt[name] if isinstance(prompt, dict) else prompt
            role = self.llm.roles[name]
            roles[name] = oracle.Role(self.last_row(name), list(ids), role.eos_ids, role.max_len)
        room = min(role.max_len - len(role.prompt) for role in roles.values())
        p = as_oracle_params(params, self.llm.roles["base"].tokenizer, room)
        if isinstance(policy, Base):
            return oracle.base(roles["base"], p)
        if isinstance(policy, Guide):
            return oracle.guide(roles["guide"], p)
        assert isinstance(policy, Nudging)
        gate = oracle.Gate(policy.threshold, policy.comparator)
        if policy.granularity == "token":
            return oracle.nudging_token(roles["base"], roles["guide"], p, gate)
        starts = self.llm.roles["base"].tokenizer.starts_with_space
        return oracle.nudging_word(roles["base"], roles["guide"], p, gate, starts)

    def outcome(self, prompt: object, params: SamplingParams, policy: Policy) -> Outcome:
        """Like `generate`, with the text and log-probabilities, ended by stop strings, too."""
        tokenizer = self.llm.roles["base"].tokenizer
        shown = tokenizer.token_bytes if params.skip_special_tokens else tokenizer.shown_bytes
        written = self.generate(prompt, params, policy)

        def bytes_of(ids: list[int]) -> bytes:
            return b"".join(map(shown, ids))

        def text_of(ids: list[int]) -> str:
            return bytes_of(ids).decode("utf-8", "replace")

        begin = len(whole_characters(bytes_of(written.token_ids[: params.min_tokens])))
        ended = oracle.end_at_stop(written, params.stop, text_of, begin)
        keeps = params.include_stop_str_in_output
        text = oracle.cut_at_stop(text_of(ended.token_ids), params.stop, begin, keeps)[0]
        if params.logprobs is None:
            return Outcome(ended, text, None)
        logprobs = []
        for i, (token, author) in enumerate(zip(ended.token_ids, ended.authors, strict=True)):
            ids = prompt[author] if isinstance(prompt, dict) else prompt
            row = self.last_row(author)(list(ids) + ended.token_ids[:i])
            logprobs.append(logprob_of(row, token, params.logprobs))
        return Outcome(ended, text, tuple(logprobs))

    def reference(
        self, prompts: dict[str, str], params: SamplingParams, policy: Nudging
    ) -> oracle.WrittenText:
        """What the text-level policy must write; prompts are texts."""
        clients = {}
        for name, text in prompts.items():
            role = self.llm.roles[name]
            tokenizer = role.tokenizer
            p = as_oracle_params(params, tokenizer)
            clients[name] = oracle.text_client(
                self.last_row(name), tokenizer.encode, tokenizer.token_bytes, role.eos_ids, text, p
            )
        base_tokenizer = self.llm.roles["base"].tokenizer
        return oracle.nudging_reference(
            clients["base"],
            clients["guide"],
            prompts["base"],
            prompts["guide"],
            oracle.Gate(policy.threshold, policy.comparator),
            lambda text: len(base_tokenizer.encode_continuation(text)),
            params.max_tokens,
        )


def one(llm: LLM, prompt: Any = PROMPT, policy: Policy | None = None, **params: Any) -> CompletionOutput:
    """The only output of one prompt."""
    return llm.generate(prompt, SamplingParams(**params), policy)[0].outputs[0]


def as_oracle_params(
    params: SamplingParams, tokenizer: Tokenizer | None = None, room: int = 0
) -> oracle.Params:
    """The same parameters for a model with that tokenizer; `room`: how many tokens its context holds yet."""
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        assert tokenizer is not None
        for text in (word, " " + word.lstrip()):
            words.append(tuple(tokenizer.encode_continuation(text)))
    return oracle.Params(
        max_tokens=room if params.max_tokens is None else params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed or 0,
        logit_bias=dict(params.logit_bias or {}),
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        bad_words=tuple(words),
        allowed_token_ids=params.allowed_token_ids,
        keeps_stop=params.include_stop_str_in_output,
    )


def whole_characters(data: bytes) -> str:
    """The text of `data` as far as nothing behind it can change it."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


@contextmanager
def held(llm: LLM) -> Iterator[None]:
    """Let the engine's thread wait: all that is submitted meanwhile comes between the same two steps."""
    gate = threading.Event()
    llm._thread.loop.post(Order(gate.wait))
    try:
        yield
    finally:
        gate.set()


def at_once(llm: LLM, prompts: Any, *more: Any) -> list[RequestOutput]:
    """`llm.generate` of several prompts, of which none begins before the others, however busy the machine."""
    with held(llm):
        handles = llm.submit_all(prompts, *more)
    return [handle.result() for handle in handles]


def written(output: CompletionOutput) -> oracle.Written:
    """An engine's output in the oracle's form."""
    assert output.error is None, output.error
    return oracle.Written(list(output.token_ids), list(output.authors), output.finish_reason)


def outcome(output: CompletionOutput) -> Outcome:
    """An engine's output in the twin's form."""
    return Outcome(written(output), output.text or "", output.logprobs)


def assert_same_text(output: CompletionOutput, expected: oracle.WrittenText) -> None:
    """Text level: the same text, the same end, and every author's part of it.

    The engine tells authors by token, so where one token holds the end of one author's words and the
    beginning of another's it belongs to the first: authors are compared at the first byte of each token.
    """
    assert output.error is None, output.error
    assert (output.text, output.finish_reason) == (expected.text, expected.finish_reason)
    owners = [author for author, text in expected.segments for _ in text.encode()]
    at = 0
    for segment in output.segments:
        if segment.text:
            assert segment.author == owners[at]
        at += len(segment.text.encode())


def assert_pools_are_whole(llm: LLM) -> None:
    """No block is lost: with nothing running, every pool is free."""
    for name, runner in llm._engine.runners.items():
        runner.pool.check()
        assert runner.pool.num_available == runner.pool.total, (
            f"{name}: {runner.pool.num_available} of {runner.pool.total}"
        )
