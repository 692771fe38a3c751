"""From what a caller asks for to requests that run: all of it is checked, then all of it is started."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from nudging.arguments import Speculate, check_ids, read_speculate, spread
from nudging.engine import Engine
from nudging.engine_thread import EngineThread
from nudging.errors import BadRequest
from nudging.handle import Handle, Owned
from nudging.params import SamplingParams
from nudging.policies import Base, Nudging
from nudging.policies.protocol import Policy
from nudging.request import Request
from nudging.request_options import RequestOptions, check_request_options
from nudging.roles import Role, check_policy


def default_policy(roles: Mapping[str, Role]) -> Policy:
    """`Nudging()` where there is a guide, else `Base()`."""
    return Nudging() if "guide" in roles else Base()


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

    def start(
        self,
        reader: Any,
        prompt: Any,
        params: SamplingParams | None,
        policy: Policy | None,
        speculate: Speculate | None,
        options: RequestOptions,
        handles: Owned,
    ) -> None:
        """One prompt, read by `reader` for every role; `handles` has it before it runs.  Raises BadRequest,
        EngineClosed.
        """
        self._submit(self._requests(reader, prompt, params, policy, speculate, options), handles)

    def start_all(
        self,
        reader: Any,
        listed: Sequence[Any],
        params: Any,
        policy: Any,
        speculate: Speculate | None,
        options: RequestOptions,
        handles: Owned,
    ) -> None:
        """All prompts, or none where one of them is refused; `handles` has each before it runs."""
        all_params = spread("sampling_params", params, len(listed))
        policies = spread("policy", policy, len(listed))
        each = zip(listed, all_params, policies, strict=True)
        jobs = [self._requests(reader, prompt, p, q, speculate, options) for prompt, p, q in each]
        for job in jobs:
            self._submit(job, handles)

    def _requests(
        self,
        reader: Any,
        prompt: Any,
        params: SamplingParams | None,
        policy: Policy | None,
        speculate: Speculate | None,
        options: RequestOptions,
    ) -> list[Request]:
        """The n requests of one prompt, all checked."""
        self._thread.check_open()
        check_request_options(options)
        params, policy = params or SamplingParams(), policy or default_policy(self._roles)
        if not isinstance(params, SamplingParams):
            raise BadRequest(f"sampling_params is a {type(params).__name__}; give SamplingParams(...)")
        check_policy(policy, self._roles)
        roles = [self._roles[name] for name in policy.roles]
        prompts = reader(prompt, roles)
        check_ids(params, roles)
        draft_len = self._draft_len if speculate is None else read_speculate(speculate)
        seed = random.getrandbits(64) if params.seed is None else params.seed
        job_id = f"request-{next(self._ids)}"
        requests = [
            Request(
                f"{job_id}-{i}",
                policy,
                params,
                (seed + i) % 2**64,
                prompts,
                self._roles,
                draft_len,
                drafter=self._drafter,
                clock=self._engine.clock,
                **options,
            )
            for i in range(params.n)
        ]
        for request in requests:
            request.siblings = tuple(requests)
        for request in requests:
            self._engine.check_fits(request)
        return requests

    def _submit(self, requests: list[Request], handles: Owned) -> None:
        handle = Handle(requests[0].id.rpartition("-")[0], requests, self._thread)
        # Whatever interrupts what follows: its owner knows it.
        handles.append(handle)
        self._thread.submit(requests, handle.mailbox)
