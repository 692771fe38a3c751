"""One job: its prompts, its policy, what has been written so far and by whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nudging.core.need import Draft, Need
from nudging.core.policy_check import check_ids
from nudging.core.sampling_params import SamplingParams
from nudging.core.sequence import Sequence
from nudging.core.speculation.ledger import MAX_ADAPTIVE_DRAFT
from nudging.errors import DeadlineExceeded
from nudging.policies.protocol import Policy, facts_of
from nudging.policies.rule import Rule
from nudging.text.detokenizer import Detokenizer, StopChecker
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from nudging.text.tokenizer import Tokenizer

# What a carried request does not have: see `Carrier`.
CARRIED = ("sequences", "output", "need", "draft")


class Piece(NamedTuple):
    """What one committed token added: itself, its author, the text that became final with it, its log-
    probability.
    """

    token: int
    author: str
    text: str
    logprob: Any = None


@dataclass
class Counters:
    """What a request has cost; times in seconds of a monotonic clock."""

    passes: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    # How often the request gave its blocks back to a higher-ranked one, and the tokens it computed again.
    preemptions: int = 0
    # Prompt tokens that were not computed, because another request had: all roles together.
    cached: int = 0
    recomputed: int = 0
    # How many drafts had so many of their tokens accepted.
    cycles: dict[int, int] = field(default_factory=dict)
    submitted_at: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None


class Carrier(Protocol):
    """What has the CARRIED attributes of requests while it carries them; see `nudging.core.fast_path`."""

    def hand_back(self, request: Request) -> None: ...
    def written(self, request: Request) -> list[tuple[int, str]]: ...
    def counters(self, request: Request) -> Counters: ...
    def held(self, request: Request) -> tuple[int, dict[str, int]]: ...
    def check(self, request: Request) -> None: ...


class Request:
    """Everything the engine knows of one job.  `need` is None only before its first admission and after
    its end.
    """

    # What carries the request now.
    _carrier: Carrier | None = None
    is_carried = False

    def __init__(
        self,
        request_id: str,
        policy: Policy,
        params: SamplingParams,
        seed: int,
        prompts: Mapping[str, RolePrompt],
        roles: Mapping[str, Role],
        draft_len: int | None = 0,
        first_position: int = 0,
        drafter: str = "guide",
        clock: Callable[[], float] = time.monotonic,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
    ) -> None:
        """`draft_len` None: as long as it pays.  `first_position`: the output position of the first
        token, for texts that go on from earlier ones.  `drafter`: its name in DRAFTERS.
        `clock`: the seconds of now, the engine's own clock.  `priority`, `timeout`,
        `cache_salt`: see RequestOptions.
        """
        self.id = request_id
        self.policy, self.facts = policy, facts_of(policy)
        self.params = params
        self.seed = seed
        self.prompts = prompts
        self.roles = roles
        self.draft_len = draft_len
        # Of the next cycle, and of the one that the device has begun, 0 for none; see `executor.cycles`.
        self.drafts_next, self.drafts_under_way = draft_len or 0, 0
        self.drafter = drafter
        self.first_position = first_position
        self.priority = priority
        # Its place among all requests, the smaller the higher: (priority, arrival), given by the scheduler.
        self.rank = (priority, 0)
        room = min(roles[role].max_len - len(prompts[role].ids) for role in self.facts.roles)
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.state: Any = policy.start()
        self.sequences: dict[str, Sequence] = {}
        self.cache_salt = cache_salt
        # All requests for the same prompts (n > 1), which is read once for them.
        self.siblings: tuple[Request, ...] = ()
        self.keeps_sequences = False
        self.output: list[int] = []
        self._pieces: list[Piece] = []
        self.tail = ""
        self.need: Need | None = None
        # Role and first row of the last need that was a prompt to read, not a text to write.
        self.long_need: tuple[str, int] | None = None
        self.draft: Draft | None = None
        # Tokens known to come (a text being scored): every role reads them all in one pass.
        self.known_ahead: tuple[int, ...] = ()
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: BaseException | None = None
        self.clock = clock
        self._counters = Counters(submitted_at=clock())
        self.timeout = timeout
        self._begin_text()

    def _begin_text(self) -> None:
        roles = self.facts.roles
        check_ids(self.params, [self.roles[role] for role in roles])
        self._max_sequence = {role: self._longest(role) for role in roles}
        # Whose tokens the text has, and whose prompt is the prompt where one has to be named.
        self.first_role = "base" if "base" in roles else roles[0]
        self.tokenizer = self.roles[self.first_role].tokenizer
        params, tokenizer = self.params, self.tokenizer
        skips = params.skip_special_tokens
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, skips)
        self._stops = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        # Of the prompt's tokens so far, of which the first has none.
        self.prompt_logprobs: list[Any] | None = None if params.prompt_logprobs is None else [None]
        # The ids of each bad word by role, in all its spellings.
        self.bad_words = {role: self.roles[role].spellings(params.bad_words) for role in roles}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in CARRIED or self._carrier is None:
                raise AttributeError(f"Request has no attribute {name!r}")
            self.bring_back()
            return getattr(self, name)

    def carry(self, carrier: Carrier) -> None:
        """From now on `carrier` has what is CARRIED."""
        self._carrier, self.is_carried = carrier, True
        for name in CARRIED:
            delattr(self, name)

    def bring_back(self) -> None:
        """Be carried no more; on the engine's thread, between two passes."""
        if self._carrier is not None:
            self.read_carried()
            self._carrier.hand_back(self)

    def take_back(
        self,
        sequences: dict[str, Sequence],
        output: list[int],
        need: Need,
        draft: Draft | None,
        counters: Counters,
    ) -> None:
        """`carrier` has it no more."""
        self._carrier, self.is_carried = None, False
        self.sequences, self.output, self.need, self.draft = sequences, output, need, draft
        self._counters = counters

    @property
    def pieces(self) -> list[Piece]:
        """What was written; may be read on any thread, and only grows.  What the carrier has written stands
        here once it was read, see `read_carried`.
        """
        return self._pieces

    def read_carried(self) -> None:
        """Make pieces of what the carrier has written; on the engine's thread."""
        if self._carrier is not None:
            for token, author in self._carrier.written(self):
                text, _ = self._push(token)
                self._pieces.append(Piece(token, author, text))

    @property
    def counters(self) -> Counters:
        """What it has cost; may be read on any thread."""
        while (carrier := self._carrier) is not None:
            # On another thread than the engine's, it may be handed back at this moment.
            with suppress(KeyError, IndexError):
                return carrier.counters(self)
        return self._counters

    @property
    def num_written(self) -> int:
        """How many tokens the output has."""
        return len(self.output) if self._carrier is None else self._carrier.held(self)[0]

    def num_blocks(self, role: str) -> int:
        """How many blocks the role's sequence holds."""
        if self._carrier is not None:
            return self._carrier.held(self)[1][role]
        return len(self.sequences[role].block_table.ids)

    @property
    def rule(self) -> Rule:
        """How the text is written, where a fast path writes it."""
        assert self.facts.rule is not None, f"{self.id} is on a fast path and its policy has no rule"
        return self.facts.rule

    @property
    def held_back(self) -> bytes:
        """The end of the text that is not handed out yet."""
        held = b"" if self._stops is None else self._stops.held.encode()
        return held + (b"" if self._detokenizer is None else self._detokenizer.held)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def need_now(self) -> Need:
        """The need of a request that runs."""
        assert self.need is not None, f"{self.id} runs without a need"
        return self.need

    @property
    def text(self) -> str:
        """The text so far, as far as it is final."""
        return "".join(piece.text for piece in self.pieces) + self.tail

    @property
    def ahead(self) -> int:
        """The most tokens computed behind the text: the policy's look-ahead and a draft."""
        return self.facts.lookahead + (MAX_ADAPTIVE_DRAFT if self.draft_len is None else self.draft_len)

    def context_length(self, role: str) -> int:
        """How many tokens `role` has to read of the prompt and the text so far."""
        if self.facts.shares_ids:
            return len(self.prompts[role].ids) + self.num_written
        return len(self.sequences[role].tokens)

    def max_sequence(self, role: str) -> int:
        """The most tokens that `role`'s sequence may hold: what has to fit into the pool, and the engine
        enforces.
        """
        return self._max_sequence[role]

    def _longest(self, role: str) -> int:
        written = self.max_tokens + self.ahead
        if not self.facts.shares_ids:
            # The client may overshoot by two blocks, and another tokenizer may cut the text finer.
            written = 2 * (written + 2 * self.facts.lookahead)
        return min(len(self.prompts[role].ids) + written, self.roles[role].max_len)

    def commit(self, token: int, author: str, logprob: Any = None) -> None:
        """Append one token; an end by stop id, stop string or length sets `finish_reason`."""
        is_stop = token in self.params.stop_token_ids and len(self.output) >= self.params.min_tokens
        if is_stop:
            self.stop_reason = token
        if is_stop and not self.params.include_stop_str_in_output:
            self.finish("stop")
            return
        if self._counters.first_token_at is None:
            self._counters.first_token_at = self.clock()
        self._write(token, author, logprob)
        if not self.is_finished and (is_stop or len(self.output) >= self.max_tokens):
            self.finish("stop" if is_stop else "length")

    def _write(self, token: int, author: str, logprob: Any = None) -> None:
        self.output.append(token)
        text, stopped = self._push(token)
        self._pieces.append(Piece(token, author, text, logprob))
        if stopped:
            self.finish_reason = "stop"

    def _push(self, token: int) -> tuple[str, bool]:
        if self._detokenizer is None:
            return "", False
        text = self._detokenizer.push(token)
        if self._stops is None:
            return text, False
        text, stopped = self._stops.push(text, may_end=len(self._pieces) >= self.params.min_tokens)
        self.stop_reason = self._stops.found or self.stop_reason
        return text, stopped

    def finish(self, reason: str) -> None:
        """End the text: what was held back (half a character, half a stop string) is final now."""
        self.bring_back()
        self.finish_reason = reason
        if self._detokenizer is None:
            return
        tail = self._detokenizer.flush()
        if self._stops is not None:
            tail, stopped = self._stops.push(tail, may_end=len(self._pieces) > self.params.min_tokens)
            if stopped:
                self.finish_reason, self.stop_reason = "stop", self._stops.found
            else:
                tail += self._stops.flush()
        self.tail = tail

    @property
    def deadline(self) -> float | None:
        """When its time is over, by the engine's clock."""
        return None if self.timeout is None else self._counters.submitted_at + self.timeout

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        deadline = self.deadline
        return deadline is not None and self.clock() >= deadline

    def expire(self) -> None:
        """End because the time is over: what was written stays readable."""
        self.finish("abort")
        if self.finish_reason == "abort":
            self.error = DeadlineExceeded(
                f"{len(self.output)} of {self.max_tokens} tokens were written within the timeout of "
                f"{self.timeout} s; raise timeout, lower max_tokens or give it a lower priority number"
            )

    def fail(self, error: BaseException) -> None:
        """End with an error: what was written stays readable."""
        self.bring_back()
        self.error = error
        self.finish_reason = "error"

    def give_up(self, error: BaseException) -> None:
        """End with an error of the engine's own, in whatever state it has left the request."""
        try:
            self.fail(error)
        except Exception:  # noqa: BLE001 - the first error is the one that counts
            self._carrier, self.is_carried = None, False
            self.error, self.finish_reason = error, "error"

    def write_texts(
        self, texts: tuple[tuple[str, str], ...], base: Tokenizer, overshoots: bool = False
    ) -> None:
        """Whole texts by their authors, as tokens of the base's tokenizer; a token belongs to who wrote
        its start.  `overshoots`: they may have more than `max_tokens`, where they are cut else.
        """
        whole = "".join(text for _, text in texts)
        owners = [author for author, text in texts for _ in text.encode()]
        at = 0
        for token in base.encode_continuation(whole):
            if len(self.output) >= self.max_tokens and not overshoots:
                self.finish("length")
                return
            author = owners[min(at, len(owners) - 1)]
            at += len(base.token_bytes(token))
            self._write(token, author)
            if self.is_finished:
                return

    def check(self) -> None:
        """Assert I1 for every role, and I3: sequences of shared ids begin with prompt and output."""
        if self._carrier is not None:
            self._carrier.check(self)
            return
        for role, sequence in self.sequences.items():
            sequence.check()
            self.check_text(role, sequence.tokens, sequence.context_len, self.output)

    def check_text(self, role: str, tokens: list[int], context_len: int, output: list[int]) -> None:
        """Assert I3 of one role's tokens."""
        prompt = self.prompts[role].ids
        same = tokens[:context_len] == prompt + output[: context_len - len(prompt)]
        assert same or not self.facts.shares_ids, f"{self.id}: {role} does not hold the text"
