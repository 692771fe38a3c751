"""What an open engine says of itself and its requests, and how one of them is ended by its id."""

from __future__ import annotations

from collections.abc import Callable

from nudging.api.jobs import Jobs, default_policy
from nudging.core.engine import Engine
from nudging.core.engine_thread import EngineThread
from nudging.core.request import Request
from nudging.core.stats import EngineStats
from nudging.errors import BadRequest, EngineClosed
from nudging.policies.protocol import Policy
from nudging.text.role_tokenizer import RoleTokenizer, find_role
from nudging.text.roles import Role


class Watched:
    """The half of `LLM` that starts nothing.  Every method may be called from any thread."""

    roles: dict[str, Role]
    _engine: Engine
    _thread: EngineThread
    _jobs: Jobs
    _described: str

    def abort(self, request_id: str) -> bool:
        """End the request of that id with the finish reason "abort"; False where none of it runs."""
        return self._jobs.abort(request_id)

    def get_tokenizer(self, role: str = "base") -> RoleTokenizer:
        """The tokenizer and chat template of a role.  Raises BadRequest where it has none."""
        return RoleTokenizer(find_role(self.roles, role))

    @property
    def is_alive(self) -> bool:
        """Whether requests are served; where not, `check_health` says why."""
        try:
            self._thread.check_open()
        except EngineClosed:
            return False
        return True

    def check_health(self) -> None:
        """Raise EngineClosed, with the reason, where no request is served any more."""
        self._thread.check_open()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._described}, {'open' if self.is_alive else 'closed'}>"

    def stats(self) -> EngineStats:
        """How many requests run and wait, how full the caches are, and what was written so far."""
        return self._engine.stats()

    def on_end(self, listener: Callable[[Request], None]) -> None:
        """Call `listener` with every request that has ended, on the engine's thread; it must not block.

        What it raises goes to the log `nudging`, and everything else goes on.
        """
        if not callable(listener):
            raise BadRequest(f"listener is {listener!r}; give a function of one ended request")
        self._thread.listeners.append(listener)

    @property
    def default_policy(self) -> Policy:
        """`Nudging()` where there is a guide, else `Base()`."""
        return default_policy(self.roles)
