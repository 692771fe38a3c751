"""From what a caller asks for to requests that run: all of it is checked, then all of it is started."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nudging.api.arguments import read_params, read_speculate, spread
from nudging.api.handle import Handle, Owned
from nudging.core.engine import Engine
from nudging.core.engine_thread import EngineThread
from nudging.core.frozen import owned
from nudging.core.policy_check import check_policy
from nudging.core.request import Request
from nudging.core.request_options import ChatOptions, read_submit_options, split_chat_options
from nudging.core.sampling_params import SamplingParams
from nudging.errors import BadRequest
from nudging.policies import Base, Nudging
from nudging.policies.forced import Forced, Owning
from nudging.policies.protocol import Policy
from nudging.text.prompts import (
    RolePrompt,
    chat_reader,
    list_chats,
    list_prompts,
    read_continuation,
    read_prompt,
)
from nudging.text.roles import Role

# Reads what a caller gives for the roles of a policy.
Reader = Callable[[Any, Sequence[Role]], dict[str, RolePrompt]]


class Job(NamedTuple):
    """One prompt's requests, all of them checked."""

    id: str
    requests: list[Request]


def default_policy(roles: Mapping[str, Role]) -> Policy:
    """`Nudging()` where there is a guide, else `Base()`."""
    return Nudging() if "guide" in roles else Base()


def read_policy(policy: Any, roles: dict[str, Role]) -> Policy:
    """The policy, our own copy of it, the default one for None.  Raises BadRequest where the roles cannot
    serve it.
    """
    own: Policy = default_policy(roles) if policy is None else owned(policy)
    check_policy(own, roles)
    return own


class Jobs:
    """Starts what callers ask of one engine; callable from any thread."""

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        roles: dict[str, Role],
        draft_len: int | None,
        drafter: str,
    ) -> None:
        """`draft_len`, `drafter`: of requests that ask for nothing else."""
        self._engine = engine
        self._thread = thread
        self._roles = roles
        self._draft_len = draft_len
        self._drafter = drafter
        self._ids = itertools.count()
        # The jobs that anybody still holds, by their ids.
        self._handles: dict[str, weakref.ref[Handle]] = {}

    def start_prompt(
        self,
        prompt: Any,
        params: Any,
        policy: Any,
        speculate: Any,
        options: Mapping[str, Any],
        handles: Owned,
    ) -> None:
        """One prompt; `handles` has it before it runs.  Raises BadRequest, EngineClosed."""
        self._submit(self._job(self._read, prompt, params, policy, speculate, options), handles)

    def start_chat(
        self,
        messages: Any,
        params: Any,
        policy: Any,
        speculate: Any,
        options: ChatOptions,
        handles: Owned,
    ) -> None:
        """One conversation, likewise."""
        template, rest = split_chat_options(options)
        self._submit(self._job(chat_reader(template), messages, params, policy, speculate, rest), handles)

    def start_prompts(self, prompts: Any, *asked: Any) -> None:
        """One prompt or several; the other arguments are those of `_start_all`."""
        self._start_all(self._read, list_prompts(prompts)[0], *asked)

    def start_chats(
        self,
        messages: Any,
        params: Any,
        policy: Any,
        speculate: Any,
        options: ChatOptions,
        handles: Owned,
    ) -> None:
        """One conversation or several."""
        template, rest = split_chat_options(options)
        self._start_all(chat_reader(template), list_chats(messages), params, policy, speculate, rest, handles)

    def start_scores(
        self, pairs: Sequence[tuple[Any, Any]], policy: Any, options: Mapping[str, Any], handles: Owned
    ) -> None:
        """Given continuations of prompts, each read under the policy, or none where one is refused."""
        self._thread.check_open()
        policy = read_policy(policy, self._roles)
        check_scorable(policy)
        roles = [self._roles[name] for name in policy.roles]
        jobs = []
        for prompt, continuation in pairs:
            ids = read_continuation(continuation, roles)
            params = SamplingParams(max_tokens=len(ids), logprobs=0, ignore_eos=True)
            job = self._job(self._read, prompt, params, Forced(policy, tuple(ids)), "off", options)
            for request in job.requests:
                check_context(request, len(ids))
                request.known_ahead = tuple(ids)
            jobs.append(job)
        for job in jobs:
            self._submit(job, handles)

    def submit_scores(
        self, pairs: Sequence[tuple[Any, Any]], policy: Any, options: Mapping[str, Any]
    ) -> Owned:
        """What `start_scores` starts."""
        with Owned() as handles:
            self.start_scores(pairs, policy, options, handles)
            return handles

    def abort(self, request_id: Any) -> bool:
        """End the job of that id with "abort"; False where none of that id runs.  Raises BadRequest."""
        if not isinstance(request_id, str):
            raise BadRequest(f"request_id is {request_id!r}; give the str that the request was started with")
        known = self._handles.get(request_id)
        handle = None if known is None else known()
        if handle is None or handle.is_finished:
            return False
        handle.cancel()
        return True

    def _read(self, prompt: Any, roles: Sequence[Role]) -> dict[str, RolePrompt]:
        return read_prompt(prompt, roles, self._roles)

    def _start_all(
        self,
        reader: Reader,
        listed: Sequence[Any],
        params: Any,
        policy: Any,
        speculate: Any,
        options: Mapping[str, Any],
        handles: Owned,
    ) -> None:
        """All prompts, or none where one of them is refused; `handles` has each before it runs."""
        if len(listed) != 1 and options.get("request_id") is not None:
            raise BadRequest(f"request_id names one request and there are {len(listed)} prompts; use submit")
        all_params = spread("sampling_params", params, len(listed))
        policies = spread("policy", policy, len(listed))
        each = zip(listed, all_params, policies, strict=True)
        jobs = [self._job(reader, prompt, p, q, speculate, options) for prompt, p, q in each]
        for job in jobs:
            self._submit(job, handles)

    def _job(
        self,
        reader: Reader,
        prompt: Any,
        params: Any,
        policy: Any,
        speculate: Any,
        options: Mapping[str, Any],
    ) -> Job:
        """The n requests of one prompt, all checked."""
        self._thread.check_open()
        given_id, request_options = read_submit_options(options)
        params, policy = read_params(params), read_policy(policy, self._roles)
        roles = [self._roles[name] for name in policy.roles]
        prompts = reader(prompt, roles)
        draft_len = self._draft_len if speculate is None else read_speculate(speculate)
        seed = random.getrandbits(64) if params.seed is None else params.seed
        job = Job(given_id or f"request-{next(self._ids)}", [])
        for i in range(params.n):
            request = Request(
                f"{job.id}-{i}",
                policy,
                params,
                (seed + i) % 2**64,
                prompts,
                self._roles,
                draft_len,
                drafter=self._drafter,
                clock=self._engine.clock,
                **request_options,
            )
            job.requests.append(request)
        for request in job.requests:
            request.siblings = tuple(job.requests)
            self._engine.check_fits(request)
        return job

    def _name(self, job_id: str, handle: Handle) -> None:
        """Let the job be found by its id.  Without a lock: an interrupt could leave it taken."""
        handles = self._handles
        own = weakref.ref(handle, lambda gone: handles.get(job_id) is gone and handles.pop(job_id, None))
        known = handles.setdefault(job_id, own)
        before = None if known is own else known()
        if before is not None and not before.is_finished:
            raise BadRequest(f"request_id is {job_id!r}, which runs already; wait for its end or abort it")
        handles[job_id] = own

    def _submit(self, job: Job, handles: Owned) -> None:
        handle = Handle(job.id, job.requests, self._thread)
        self._name(job.id, handle)
        # Whatever interrupts what follows: its owner knows it.
        handles.append(handle)
        self._thread.submit(job.requests, handle.mailbox)


def check_scorable(policy: Policy) -> None:
    """Raise BadRequest where a policy cannot say whose a given token is."""
    if not policy.shares_ids or not isinstance(policy, Owning):
        raise BadRequest(
            f"{policy!r} cannot score given texts: it has no method `owner` for tokens; use one that has, "
            "such as Base() or Nudging(granularity='token')"
        )


def check_context(request: Request, length: int) -> None:
    """Raise BadRequest where `length` more tokens do not fit into the context of every role."""
    if request.max_tokens < length:
        raise BadRequest(
            f"the continuation has {length} tokens and the context has room for {request.max_tokens} after "
            "the prompt; shorten one of them"
        )
