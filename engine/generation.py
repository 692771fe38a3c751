"""A text that stays open: extend it, fork it, rewind it, score what could follow."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

from nudging.decide import TokenLogprob
from nudging.engine import Engine
from nudging.engine_thread import EngineThread
from nudging.errors import BadRequest, EngineClosed
from nudging.handle import Handle
from nudging.output import CompletionOutput
from nudging.params import SamplingParams, is_int
from nudging.policies.forced import Forced, Owning
from nudging.policies.protocol import Policy
from nudging.prompts import RolePrompt
from nudging.request import Request
from nudging.request_options import RequestOptions
from nudging.roles import Role
from nudging.sequence import Sequence
from nudging.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Self


class Generation:
    """Prompt and text of one job, with every role's cache kept between calls.

    Forks share their cache until they differ.  Under memory pressure an idle generation's cache is given
    up and computed again at its next use; its text never changes.  Not thread-safe; many may be open at
    once.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        roles: Mapping[str, Role],
        policy: Policy,
        prompts: Mapping[str, RolePrompt],
        options: RequestOptions,
    ) -> None:
        if not policy.shares_ids:
            raise BadRequest(f"{policy!r} works on whole texts and cannot be opened; use generate()")
        self.policy = policy
        self.token_ids: list[int] = []
        self.authors: list[str] = []
        self._engine = engine
        self._thread = thread
        self._roles = roles
        self._prompts = dict(prompts)
        self._options = options
        self._sequences: dict[str, Sequence] = {}
        self._count = itertools.count()
        self._seed = random.getrandbits(64)
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def text(self) -> str:
        """The text so far.  Raises BadRequest where the checkpoint has no tokenizer."""
        return self._tokenizer().text_of(self.token_ids)

    def extend(
        self, sampling_params: SamplingParams | None = None, *, text: str | Ids[int] | None = None
    ) -> CompletionOutput:
        """Let the policy write on; or, with `text`, write that (a str or token ids) as the author "caller".

        The noise of a token depends on the seed and its position in the whole text: two calls of 10 tokens
        write what one of 20 does, wherever the policy keeps no state between tokens.  Without a seed this
        generation's own is used.  Raises BadRequest, EngineClosed.
        """
        if text is not None:
            return self._write(self._ids(text))
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise BadRequest(f"n is {params.n}; an open generation is one text, fork() it for more")
        return self._append(self._start(params, self.policy))

    def fork(self) -> Generation:
        """An independent copy; the caches are shared until one of the two writes."""
        self._check_open()
        other = Generation(self._engine, self._thread, self._roles, self.policy, self._prompts, self._options)
        other.token_ids = list(self.token_ids)
        other.authors = list(self.authors)
        other._seed = self._seed
        self._thread.call(lambda: self._fork_into(other))
        return other

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens of the text and forget the rest."""
        self._check_open()
        if not is_int(length) or not 0 <= length <= len(self.token_ids):
            raise BadRequest(f"rewind to {length!r}; the text has {len(self.token_ids)} tokens")
        del self.token_ids[length:]
        del self.authors[length:]

    def score(self, continuation: str | Ids[int]) -> list[float]:
        """The log-probability of each token of `continuation` after the text so far, under the policy.

        A token counts under the role that owns its position: the base's distribution where the base
        speaks, the guide's where it is nudged.  The text itself stays as it is.
        """
        ids = self._ids(continuation)
        if not isinstance(self.policy, Owning):
            raise BadRequest(f"{self.policy!r} cannot score given texts: it has no method `owner`")
        params = SamplingParams(max_tokens=len(ids), logprobs=0, ignore_eos=True)
        output = finished(self._start(params, Forced(self.policy, tuple(ids)), known_ahead=tuple(ids)))
        logprobs = output.logprobs or ()
        return [entry.logprob for entry in logprobs if isinstance(entry, TokenLogprob)]

    def close(self) -> None:
        """Give the caches back.  May be called twice, and after the LLM was closed."""
        if self._is_open:
            self._is_open = False
            try:
                self._thread.call(self._release)
            except EngineClosed:
                # The engine took the memory with it.
                self._sequences.clear()

    def _append(self, handle: Handle) -> CompletionOutput:
        """What an extension wrote becomes text.  Raises the error it ended with."""
        output = finished(handle)
        self.token_ids += output.token_ids
        self.authors += output.authors
        return output

    def _start(self, params: SamplingParams, policy: Policy, known_ahead: tuple[int, ...] = ()) -> Handle:
        """One request that goes on from prompt + text, with this generation's caches."""
        self._check_open()
        prompts = {name: RolePrompt(prompt.ids + self.token_ids) for name, prompt in self._prompts.items()}
        for name, prompt in prompts.items():
            if len(prompt.ids) >= self._roles[name].max_len:
                raise BadRequest(
                    f"prompt and text have {len(prompt.ids)} tokens and the context of {name!r} is "
                    f"{self._roles[name].max_len}; rewind() or open a shorter prompt"
                )
        seed = self._seed if params.seed is None else params.seed
        name = f"generation-{id(self)}-{next(self._count)}"
        request = Request(
            name,
            policy,
            params,
            seed,
            prompts,
            self._roles,
            0,
            len(self.token_ids),
            clock=self._engine.clock,
            **self._options,
        )
        request.known_ahead = known_ahead
        request.keeps_sequences = True
        request.sequences = self._thread.call(lambda: self._adopt(prompts))
        handle = Handle(name, [request], self._thread)
        self._thread.submit([request], handle)
        return handle

    def _adopt(self, prompts: dict[str, RolePrompt]) -> dict[str, Sequence]:
        """The sequences, made to hold exactly prompt + text; rows were picked under other parameters."""
        for name, prompt in prompts.items():
            pool = self._engine.runners[self._roles[name].model].pool
            salt = self._options.get("cache_salt")
            sequence = self._sequences.setdefault(name, Sequence(pool, (), salt))
            sequence.set_context(0, prompt.ids)
            sequence.truncate(len(prompt.ids))
            sequence.rows.clear()
            sequence.prompt_len = sequence.context_len = len(prompt.ids)
        return self._sequences

    def _fork_into(self, other: Generation) -> None:
        for name, sequence in self._sequences.items():
            other._sequences[name] = sequence.fork()
            self._engine.scheduler.keep(other._sequences[name])

    def _release(self) -> None:
        for sequence in self._sequences.values():
            self._engine.scheduler.take(sequence)
            sequence.release()

    def _write(self, ids: list[int]) -> CompletionOutput:
        """Append given tokens; nothing is computed until they are needed."""
        self._check_open()
        self.token_ids += ids
        self.authors += ["caller"] * len(ids)
        return CompletionOutput.written(
            "caller", ids, self._tokenizer().text_of(ids) if self._has_text() else None
        )

    def _ids(self, text: str | Ids[int]) -> list[int]:
        ids = self._tokenizer().encode_continuation(text) if isinstance(text, str) else list(text)
        if not ids:
            raise BadRequest("the continuation is empty; give at least one character or one token id")
        size = min(self._roles[name].vocab_size for name in self.policy.roles)
        for token in ids:
            if not is_int(token) or not 0 <= token < size:
                raise BadRequest(f"the continuation holds {token!r}; token ids go from 0 to {size - 1}")
        return ids

    def _has_text(self) -> bool:
        return self._roles[self.policy.roles[0]].tokenizer is not None

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._roles[self.policy.roles[0]].tokenizer
        if tokenizer is None:
            raise BadRequest("this checkpoint has no tokenizer; give token ids")
        return tokenizer

    def _check_open(self) -> None:
        if not self._is_open:
            raise BadRequest("this generation was closed; open() another")


def finished(handle: Handle) -> CompletionOutput:
    """The one output of a generation's request.  Raises the error it ended with."""
    output = handle.result().outputs[0]
    if output.error is not None:
        raise output.error
    return output
