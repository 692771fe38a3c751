"""Requests whose steps are ordinary, carried in C++ from step to step.

In the midst of a text a step of a built-in policy needs nothing of Python: rows come, tokens are written, the
next rows are needed.  `_C.FastPath` does for many requests at once what sequence.py, view.py, draft.py,
scheduler.py, batch.py and engine.py say for one; they are its readable twin and do every step that is not
ordinary: a prompt, an end, a lack of blocks, a policy of the caller's own.

A carried request has no `sequences`, `output`, `need` and `draft`: asking for one takes the request back,
at any time between two passes, and the next step goes on from there.  What other threads may ask for,
`pieces` and `counters`, can be read while it is carried.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nudging import _C
from nudging.core.block_pool import BlockPool
from nudging.core.fast_path_rules import NO_ENDS, RuleNumbers, ends_of, face_of, number_of, rule_numbers
from nudging.core.need import Draft, Need
from nudging.core.request import Counters, Request
from nudging.core.rows import Row
from nudging.core.sequence import Sequence as TokenSequence
from nudging.core.speculation.ledger import Costs, Ledger
from nudging.core.speculation.pass_costs import PassCosts
from nudging.core.speculation.shared_floats import address
from nudging.errors import NumericalError, OutOfBlocks

# After so many steps at most, requests are carried again.
MAX_REST = 8
# Behind the numbers of all requests.
END = 2**63 - 1


@dataclass
class Carried:
    """What Python keeps of a carried request."""

    request: Request
    roles: tuple[str, ...]
    sequences: dict[str, TokenSequence]
    output: list[int]
    counters: Counters
    ledger: Ledger


@dataclass(frozen=True)
class Planned:
    """What carried requests compute of one model in a step: tokens, and the blocks they lack."""

    tokens: int
    missing: int


class FastPath:
    """The carried requests of one engine."""

    def __init__(
        self,
        pools: Mapping[str, BlockPool],
        models_of: Mapping[str, str],
        costs: Mapping[str, Costs],
        carries: bool = True,
    ) -> None:
        """`costs`: of passes of each model.  `carries` False: nobody is carried."""
        self._carries = carries
        self._models = list(pools)
        self._models_of = models_of
        self._costs = costs
        # C++ holds what it calls, where the garbage collector does not see it: nothing of that may hold this.
        me = weakref.proxy(self)
        faces = [face_of(pool, partial(setattr, me, "_lack")) for pool in pools.values()]
        register, token_bytes = partial(FastPath._register, me), partial(FastPath._token_bytes, me)
        cost, curve = partial(FastPath._cost, me), partial(FastPath._curve, me)
        self._core = _C.FastPath(faces, register, token_bytes, cost, curve)
        # What the last allocation that failed said.
        self._lack: OutOfBlocks | None = None
        self._carried: dict[int, Carried] = {}
        self._ids: dict[str, int] = {}
        self._failed: list[tuple[Request, str, int, NumericalError]] = []
        # Where something lacks in step after step, going back and forth costs more than it saves: nobody is
        # carried for `_rest` steps, and for `_next_rest` when it happens again at once.
        self._rest = self._next_rest = 0

    def __len__(self) -> int:
        return len(self._carried)

    def offer(self, request: Request, ledger: Ledger) -> None:
        """Carry the request from here on, if its next step may be ordinary."""
        rule = rule_numbers(request) if self._carries and not self._rest else None
        if rule is None or not self._is_ordinary(request):
            return
        number = number_of(request)
        self._core.enter(number, self._state(request, rule, ledger))
        self._ids[request.id] = number
        self._carried[number] = Carried(
            request, request.facts.roles, request.sequences, request.output, request.counters, ledger
        )
        request.carry(self)

    def hand_back(self, request: Request) -> None:
        """Give the request its attributes back, as they are now; see `Request.bring_back`."""
        number = self._ids.pop(request.id)
        passes, drafted, accepted, cycles = self._core.counted(number)
        carried = self._carried.pop(number)
        counters = _counted(carried, passes, drafted, accepted, cycles)
        tracks, output, begin, need, draft = self._core.leave(number)
        for role, track in zip(carried.roles, tracks, strict=True):
            _restore(carried.sequences[role], track)
        carried.output[begin:] = output
        index, first, last, ahead, has_ends = need
        name = carried.roles[index]
        ends = ends_of(request, name) if has_ends else NO_ENDS
        request.take_back(
            carried.sequences,
            carried.output,
            Need(name, first, last, ahead, ends),
            None if draft is None else Draft(*draft),
            counters,
        )

    def counters(self, request: Request) -> Counters:
        """What a carried request has cost so far."""
        number = self._ids[request.id]
        return _counted(self._carried[number], *self._core.counted(number))

    def written(self, request: Request) -> list[tuple[int, str]]:
        """The tokens that came since the last call, and who wrote them."""
        number = self._ids[request.id]
        tokens, authors = self._core.take_written(number)
        roles = self._carried[number].roles
        return [(token, roles[author]) for token, author in zip(tokens, authors, strict=True)]

    def held(self, request: Request) -> tuple[int, dict[str, int]]:
        """How many tokens a carried request has written, and how many blocks its roles hold."""
        number = self._ids[request.id]
        written, blocks = self._core.held(number)
        return written, dict(zip(self._carried[number].roles, blocks, strict=True))

    def claims(self, headroom_blocks: int) -> tuple[dict[str, int], list[tuple[Request, str]]]:
        """The blocks of each model that the carried requests claim, and the roles that hold none yet."""
        blocks, without = self._core.claims(headroom_blocks)
        carried = [(self._carried[number], role) for number, role in without]
        empty = [(one.request, one.roles[role]) for one, role in carried]
        return dict(zip(self._models, blocks, strict=True)), empty

    def count_known(self, request: Request, role: str, limit: int) -> int:
        """`Sequence.count_known` of a role that is carried and holds no block."""
        sequence = self._carried[self._ids[request.id]].sequences[role]
        return sequence.count_known(limit, self.look(request)[role].tokens)

    def look(self, request: Request) -> dict[str, _C.SequenceState]:
        """The sequences of a carried request by role, as they are now."""
        number = self._ids[request.id]
        return dict(zip(self._carried[number].roles, self._core.look(number)[0], strict=True))

    def check(self, request: Request) -> None:
        """What `Request.check` asserts, of one that is carried and stays so."""
        number = self._ids[request.id]
        carried = self._carried[number]
        tracks, output, begin, *_ = self._core.look(number)
        output = carried.output[:begin] + output
        for role, track in zip(carried.roles, tracks, strict=True):
            sequence = carried.sequences[role]
            tokens = sequence.tokens[: track.begin] + track.tokens
            sequence.check_as(tokens, track.num_computed, track.blocks)
            request.check_text(role, tokens, track.context_len, output)

    def plan(self, model: str) -> Planned:
        """Find what carried requests need of a model now; those that are not ordinary are handed back."""
        tokens, missing, back = self._core.plan(self._models.index(model))
        for number in back:
            self._carried[number].request.bring_back()
        return Planned(tokens, missing)

    def own(self) -> None:
        """Own the blocks of what is planned; a request that cannot fails."""
        self._next_rest = 0
        for number in self._core.own():
            assert self._lack is not None
            self._carried[number].request.fail(self._lack)

    def hand_back_planned(self) -> None:
        """Hand back everyone who is planned: tokens or blocks do not suffice for all."""
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest + 1, MAX_REST)
        for number in {number for number, *_ in self._core.spans()}:
            self._carried[number].request.bring_back()

    def path_lengths(self) -> list[int]:
        return self._core.path_lengths()

    def ready(self, model: str) -> int:
        return self._core.ready(self._models.index(model))

    def cap_paths(self, steps: int, running: int) -> None:
        """Write paths of at most so many tokens; see `nudging.core.coscheduling.path_ahead`."""
        self._core.cap_paths(steps, running)

    def onward(self) -> None:
        """Go on to the next token of every path."""
        self._core.onward()

    @property
    def num_tokens(self) -> int:
        """How many tokens are to be computed now."""
        return self._core.tokens()

    @property
    def num_answers(self) -> int:
        """How many rows are to be answered now."""
        return self._core.answers()

    @property
    def num_planned(self) -> int:
        """How many requests have something computed now."""
        return self._core.planned()

    @property
    def core(self) -> _C.FastPath:
        return self._core

    def sampled(self) -> list[tuple[int, Request, int]]:
        """The answers whose token is not simply the likeliest: which, whose, and the output position."""
        found = []
        for answer, number, role, position in self._core.sampled():
            carried = self._carried[number]
            request = carried.request
            begin = len(request.prompts[carried.roles[role]].ids)
            found.append((answer, request, request.first_position + position - begin))
        return found

    def take(self, rows: Sequence[Row | NumericalError]) -> None:
        """The rows of what was computed, in order."""
        said = [
            None if isinstance(row, NumericalError) else (0, row.token, row.top_token, row.top_prob)
            for row in rows
        ]
        self.fail([(*where, rows[at]) for *where, at in self._core.take_rows(said)])

    def fail(self, failed: Iterable[tuple[Any, ...]]) -> None:
        """These rows are not finite: number, role, position and error of each."""
        for number, role, position, error in failed:
            assert isinstance(error, NumericalError)
            carried = self._carried[number]
            self._failed.append((carried.request, carried.roles[role], position, error))

    def learned(self, model: str) -> None:
        """What passes of the model cost has been learned anew."""
        self._core.forget_prices(self._models.index(model))

    def settle(self) -> list[Request]:
        """Hand back the requests with rows that are not finite: those count where a policy asks for them."""
        self._rest = max(self._rest - 1, 0)
        failed, self._failed = self._failed, []
        for request, role, position, error in failed:
            request.bring_back()
            request.sequences[role].rows[position] = error
        return list(dict.fromkeys(request for request, *_ in failed))

    def advance(
        self, before: Request | None, sharers: Mapping[str, float]
    ) -> tuple[list[Request], Request | None]:
        """Let the policies of those that rank above `before` (None: of all) run on, in their order: the
        requests that moved, and one whose step Python does before the next.  `sharers`: how many requests
        share the passes of each model.
        """
        limit = END if before is None else number_of(before)
        moved, back = self._core.advance_before(limit, [sharers[model] for model in self._models])
        if back is None:
            return [self._carried[number].request for number in moved], None
        requests = [self._carried[number].request for number in (*moved, back)]
        requests[-1].bring_back()
        return requests[:-1], requests[-1]

    def describe(self) -> dict[str, str]:
        """What is computed of whom, for the timeline."""
        return {
            f"{carried.request.id} {carried.roles[role]}": f"{start}:{end}, {end - first + 1} answers"
            for number, role, start, end, first, *_ in self._core.spans()
            for carried in (self._carried[number],)
        }

    def _is_ordinary(self, request: Request) -> bool:
        need = request.need
        if need is None or request.is_finished or request.counters.first_token_at is None:
            return False
        if request.known_ahead or request.keeps_sequences or request.long_need == (need.role, need.first):
            return False
        for sequence in request.sequences.values():
            if request.siblings and sequence.num_computed < sequence.prompt_len - 1:
                return False
            if sequence.lost or sequence.num_owned_from is None:
                return False
            if len(sequence.finite_rows) < len(sequence.rows):
                return False
        return need.last - request.sequences[need.role].num_computed <= _C.DECODE_TOKENS

    def _state(self, request: Request, rule: RuleNumbers, ledger: Ledger) -> _C.CarriedState:
        roles = request.facts.roles
        need, draft, params = request.need_now, request.draft, request.params
        written = min(s.context_len - s.prompt_len for s in request.sequences.values())
        begin = written if draft is None else min(written, draft.start)
        return _C.CarriedState(
            rule,
            [self._track(request, role) for role in roles],
            begin,
            request.output[begin:],
            request.max_tokens,
            -1 if request.draft_len is None else request.draft_len,
            min(request.roles[role].vocab_size for role in roles),
            list(params.stop_token_ids),
            [] if request.tokenizer is None else [stop.encode() for stop in params.stop],
            request.held_back,
            params.is_greedy,
            request.drafter == "guide" and roles == ("base", "guide"),
            (roles.index(need.role), need.first, need.last, need.ahead, bool(need.ends)),
            None if draft is None else (draft.start, draft.length, draft.tokens),
            address(ledger),
            address(ledger.account),
        )

    def _track(self, request: Request, name: str) -> _C.SequenceState:
        sequence, role = request.sequences[name], request.roles[name]
        pool = sequence.block_table.pool
        begin = min(sequence.num_computed, sequence.context_len)
        if pool.prefix_caching:
            begin = min(begin, sequence.num_registered * pool.block_size)
        owned_from = sequence.num_owned_from
        assert owned_from is not None
        return _C.SequenceState(
            self._models.index(self._models_of[name]),
            sequence.prompt_len,
            role.max_len,
            request.max_sequence(name),
            list(ends_of(request, name)),
            begin,
            sequence.tokens[begin:],
            sequence.num_computed,
            sequence.context_len,
            [(at, row.token, row.top_token, row.top_prob) for at, row in sequence.finite_rows.items()],
            sequence.block_table.ids,
            sequence.num_registered,
            owned_from,
        )

    def _register(self, number: int, role: int, tokens: list[int], block: int) -> int:
        carried = self._carried[number]
        return carried.sequences[carried.roles[role]].register_block(tokens, block)

    def _cost(self, model: int, rows: float, answers: float) -> float:
        return self._costs[self._models[model]].of(rows, answers)

    def _curve(self, model: int) -> tuple[float, float, list[tuple[float, float]]] | None:
        costs = self._costs[self._models[model]]
        return costs.curve if isinstance(costs, PassCosts) else None

    def _token_bytes(self, number: int, token: int) -> bytes:
        tokenizer = self._carried[number].request.tokenizer
        assert tokenizer is not None
        return tokenizer.token_bytes(token)


def _restore(sequence: TokenSequence, track: _C.SequenceState) -> None:
    sequence.tokens[track.begin :] = track.tokens
    sequence.num_computed = track.num_computed
    sequence.context_len = track.context_len
    sequence.rows = {at: Row(token, top, prob) for at, token, top, prob in track.rows}
    sequence.block_table.ids = track.blocks


def _counted(
    carried: Carried,
    passes: list[int],
    drafted: int,
    accepted: int,
    cycles: dict[int, int],
) -> Counters:
    """The counters at the entry and what came since."""
    before = carried.counters
    made = {role: before.passes.get(role, 0) + n for role, n in zip(carried.roles, passes, strict=True)}
    lengths = before.cycles.keys() | cycles.keys()
    return replace(
        before,
        passes={role: n for role, n in made.items() if n},
        drafted=before.drafted + drafted,
        accepted=before.accepted + accepted,
        cycles={n: before.cycles.get(n, 0) + cycles.get(n, 0) for n in sorted(lengths)},
    )
