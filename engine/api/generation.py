"""A text that stays open: extend it, fork it, rewind it, score what could follow."""

from __future__ import annotations

import itertools
import os
import random
import uuid
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING, NamedTuple

from nudging.api.arguments import read_params
from nudging.api.handle import Handle
from nudging.api.outputs import CompletionOutput, RequestOutput
from nudging.checks import is_int, plain
from nudging.core.engine import Engine
from nudging.core.engine_loop import EngineLoop, Order
from nudging.core.engine_thread import EngineThread
from nudging.core.request import Request
from nudging.core.request_options import RequestOptions
from nudging.core.rows import TokenLogprob
from nudging.core.sampling_params import SamplingParams
from nudging.core.sequence import Sequence
from nudging.errors import BadRequest, EngineClosed
from nudging.policies.forced import Forced, Owning
from nudging.policies.protocol import Policy
from nudging.text.prompts import RolePrompt, read_continuation
from nudging.text.roles import Role
from nudging.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Self


class Text(NamedTuple):
    """A text at one moment: replaced as a whole, so that no interrupt leaves half of it."""

    token_ids: list[int]
    authors: list[str]


class Caches:
    """What an open text has in the engine: its sequences and its one request; for the engine's thread."""

    def __init__(self, engine: Engine, loop: EngineLoop) -> None:
        self.engine = engine
        self.loop = loop
        self.sequences: dict[str, Sequence] = {}
        self.live: Request | None = None
        self._is_released = False

    def check_idle(self) -> None:
        """Raise BadRequest while a request writes: a call that was left has ended its own before this."""
        if self._is_released:
            raise closed()
        if self.live is not None and not self.live.is_finished:
            raise under_way()

    def lend(self, request: Request, models: Mapping[str, str]) -> None:
        """Give a request the sequences, made to hold exactly prompt + text; rows were picked under other
        parameters.
        """
        self.check_idle()
        for name, prompt in request.prompts.items():
            pool = self.engine.runners[models[name]].pool
            sequence = self.sequences.setdefault(name, Sequence(pool, (), request.cache_salt))
            sequence.set_context(0, prompt.ids)
            sequence.truncate(len(prompt.ids))
            sequence.rows.clear()
            sequence.prompt_len = sequence.context_len = len(prompt.ids)
        request.sequences = self.sequences
        self.live = request

    def fork_into(self, other: Caches) -> None:
        self.check_idle()
        for name, sequence in self.sequences.items():
            other.sequences[name] = sequence.fork()
            self.engine.scheduler.keep(other.sequences[name])

    def release(self) -> None:
        """End what is under way and give everything back; whatever comes later is refused."""
        self._is_released = True
        if self.live is not None:
            self.loop.abort([self.live])
        self.live = None
        for sequence in self.sequences.values():
            self.engine.scheduler.take(sequence)
            sequence.release()
        self.sequences = {}


class Generation:
    """Prompt and text of one job, with every role's cache kept between calls.

    Forks share their cache until they differ.  Under memory pressure an idle generation's cache is given
    up and computed again at its next use; its text never changes.  Many may be open at once; each does one
    thing at a time.

    A call that is left by an exception (an interrupt, an error of its own) leaves the text as it was before:
    what it had written is dropped, and its request ends.  The next call begins after that.  A generation that
    is dropped gives its cache back as if it had been closed.
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
        self._text = Text([], [])
        self._engine = engine
        self._thread = thread
        self._roles = roles
        self._prompts = dict(prompts)
        self._options = options
        self._caches = Caches(engine, thread.loop)
        # What a call has begun and not come to the end of.
        self._live: Handle | None = None
        # Nobody else's, whatever becomes of this one's place in memory.
        self._name = f"generation-{uuid.uuid4().hex}"
        self._count = itertools.count()
        self._seed = random.getrandbits(64)
        self._is_open = True
        self._will = weakref.finalize(self, forget, self._caches, os.getpid())
        # With its process all ends.
        self._will.atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the text so far."""
        return self._text.token_ids

    @property
    def authors(self) -> list[str]:
        """Who wrote each token: a role, or "caller"."""
        return self._text.authors

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
        generation's own is used.  Raises BadRequest, also where both are given, and EngineClosed.
        """
        if text is not None:
            if sampling_params is not None:
                raise BadRequest(
                    f"sampling_params and text={text!r:.80} are given; text is written as it stands and the "
                    "parameters are for what the policy writes: call extend once for each"
                )
            return self._write(self._ids(text))
        self._thread.check_may_wait("extend()")
        self._check_idle()
        with Leaving(self):
            return extended(self, self.begin(sampling_params).result())

    def fork(self) -> Generation:
        """An independent copy; the caches are shared until one of the two writes."""
        self._check_idle()
        other = Generation(self._engine, self._thread, self._roles, self.policy, self._prompts, self._options)
        other._text = Text(list(self.token_ids), list(self.authors))
        other._seed = self._seed
        self._thread.call(lambda: self._caches.fork_into(other._caches))
        return other

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens of the text and forget the rest."""
        self._check_idle()
        length = plain(length)
        if not is_int(length) or not 0 <= length <= len(self.token_ids):
            raise BadRequest(f"rewind to {length!r}; the text has {len(self.token_ids)} tokens")
        self._text = Text(self.token_ids[:length], self.authors[:length])

    def score(self, continuation: str | Ids[int]) -> list[float]:
        """The log-probability of each token of `continuation` after the text so far, under the policy.

        A token counts under the role that owns its position: the base's distribution where the base
        speaks, the guide's where it is nudged.  A given text has no look-ahead: a policy of words leaves all
        up to the end of the text to a guide that foresees it, and here each of those words is owned by
        whichever model its own position says.  The text itself stays as it is.
        """
        self._thread.check_may_wait("score()")
        self._check_idle()
        with Leaving(self):
            return scores(self.begin_score(continuation).result())

    def close(self) -> None:
        """Give the caches back; what is under way ends with "abort".  May be called twice, and after the LLM
        was closed.
        """
        if self._is_open:
            self._is_open = False
            self._will.detach()
            try:
                self._thread.call(self._caches.release)
            except EngineClosed:
                # The engine took the memory with it.
                self._caches.sequences = {}

    def begin(self, sampling_params: SamplingParams | None = None) -> Handle:
        """Start to extend; what it comes to is `extended` by its result, unless it is to `leave`."""
        if isinstance(sampling_params, str):
            raise BadRequest(
                f"sampling_params is {sampling_params!r:.80}; write a text with extend(text=...)"
            )
        params = read_params(sampling_params)
        if params.n != 1:
            raise BadRequest(f"n is {params.n}; an open generation is one text, fork() it for more")
        if params.prompt_logprobs is not None:
            raise BadRequest(
                f"prompt_logprobs is {params.prompt_logprobs}; an open generation has read its prompt, use "
                "generate() for them"
            )
        return self._start(params, self.policy)

    def begin_score(self, continuation: str | Ids[int]) -> Handle:
        """Start to score; what it comes to is `scores` of its result."""
        ids = self._ids(continuation)
        if not isinstance(self.policy, Owning):
            raise BadRequest(f"{self.policy!r} cannot score given texts: it has no method `owner`")
        params = SamplingParams(max_tokens=len(ids), logprobs=0, ignore_eos=True)
        return self._start(params, Forced(self.policy, tuple(ids)), known_ahead=tuple(ids))

    def leave(self) -> None:
        """End what this generation has under way, if anything: nobody waits for it any more."""
        if self._live is not None:
            self._live.abandon()
        self._live = None

    def _start(self, params: SamplingParams, policy: Policy, known_ahead: tuple[int, ...] = ()) -> Handle:
        """One request that goes on from prompt + text, with this generation's caches."""
        self._check_idle()
        prompts = {name: RolePrompt(prompt.ids + self.token_ids) for name, prompt in self._prompts.items()}
        for name, prompt in prompts.items():
            if len(prompt.ids) >= self._roles[name].max_len:
                raise BadRequest(
                    f"prompt and text have {len(prompt.ids)} tokens and the context of {name!r} is "
                    f"{self._roles[name].max_len}; rewind() or open a shorter prompt"
                )
        request = Request(
            f"{self._name}-{next(self._count)}",
            policy,
            params,
            self._seed if params.seed is None else params.seed,
            prompts,
            self._roles,
            0,
            len(self.token_ids),
            clock=self._engine.clock,
            **self._options,
        )
        request.known_ahead = known_ahead
        request.keeps_sequences = True
        models = {name: self._roles[name].model for name in prompts}
        handle = self._live = Handle(request.id, [request], self._thread)
        caches = self._caches
        self._thread.submit([request], handle.mailbox, lambda: caches.lend(request, models))
        return handle

    def _write(self, ids: list[int]) -> CompletionOutput:
        """Append given tokens; nothing is computed until they are needed."""
        self._check_idle()
        text = self._tokenizer().text_of(ids) if self._has_text() else None
        output = CompletionOutput.written("caller", ids, text)
        before = self._text
        self._text = Text([*before.token_ids, *ids], [*before.authors, *output.authors])
        return output

    def _ids(self, text: str | Ids[int]) -> list[int]:
        return read_continuation(text, [self._roles[name] for name in self.policy.roles])

    def _has_text(self) -> bool:
        return self._roles[self.policy.roles[0]].tokenizer is not None

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._roles[self.policy.roles[0]].tokenizer
        if tokenizer is None:
            raise BadRequest("this checkpoint has no tokenizer; give token ids")
        return tokenizer

    def _check_idle(self) -> None:
        if not self._is_open:
            raise closed()
        if self._live is not None and not self._live.is_finished:
            raise under_way()


class Leaving:
    """Around a call: what it has begun ends with it, also where it is left by an exception."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __enter__(self) -> None:
        """Nothing is begun yet."""

    def __exit__(self, *exception: object) -> None:
        self._generation.leave()


def closed() -> BadRequest:
    """What a call says that comes too late."""
    return BadRequest("this generation was closed; open() another")


def under_way() -> BadRequest:
    """What a call says that comes while another one writes."""
    return BadRequest("another call of this generation is under way; wait for its end, or open a second text")


def forget(caches: Caches, process: int) -> None:
    """A generation is gone that was not closed."""
    if os.getpid() == process:
        caches.loop.post(Order(caches.release))


def only(result: RequestOutput) -> CompletionOutput:
    """The one output of a generation's request.  Raises the error it ended with."""
    output = result.outputs[0]
    error = output.error
    if error is None:
        return output
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        raise error
    # Raised here it would be taken for an interrupt of the caller, or for the end of an iteration.
    raise RuntimeError(f"the policy raised {error!r}") from error


def extended(generation: Generation, result: RequestOutput) -> CompletionOutput:
    """What an extension wrote, which becomes text of its generation.  Raises the error it ended with."""
    output = only(result)
    before = generation._text
    generation._text = Text([*before.token_ids, *output.token_ids], [*before.authors, *output.authors])
    return output


def scores(result: RequestOutput) -> list[float]:
    """The log-probability of each token that was scored."""
    logprobs = only(result).logprobs or ()
    return [entry.logprob for entry in logprobs if isinstance(entry, TokenLogprob)]
