"""Decides which requests run, with which memory, and which tokens each model computes next: from ranks, needs
and budgets.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from nudging import _C
from nudging.core.block_pool import BlockPool
from nudging.core.claims import Claims
from nudging.core.fast_path import FastPath, Planned
from nudging.core.ranked import Ranked
from nudging.core.request import Request
from nudging.core.sequence import Sequence
from nudging.core.work import Found, SchedulerOutput, Work
from nudging.errors import OutOfBlocks

# A request with at most this many tokens to compute is being written, not read: it goes before long prompts.
DECODE_TOKENS = _C.DECODE_TOKENS
# Of each step's tokens so much is for long prompts, where there are any.
PROMPT_SHARE = 0.25


class Scheduler:
    """Requests ranked by priority, then arrival; memory by rank.

    A request is admitted in its turn, when every pool has room for what it and the running ones hold and will
    soon hold.  Where a block is needed and none is free, idle caches go first; then the lowest-ranked running
    request gives all its blocks back and waits again: its text and its rows stay, and what is computed again
    is bit for bit what it was.  A request that nobody ranks below keeps its blocks and sits the step out.

    Nothing is lost and nothing stands still: every request fits alone (`Engine.check_fits`), the
    highest-ranked one can have the blocks of all others and gets tokens in every step, so it comes to its
    end, and then the next one is the highest.  Nor do two throw each other out in turn: the higher one is
    never preempted for the lower one, and that one comes back only when both fit with room to grow.
    """

    def __init__(
        self,
        pools: dict[str, BlockPool],
        models_of: dict[str, str],
        max_batch_tokens: int,
        fast_path: FastPath,
    ) -> None:
        """`fast_path`: carries ordinary requests."""
        self.pools = pools
        self.fast_path = fast_path
        self.models_of = models_of
        self.max_batch_tokens = max_batch_tokens
        self.waiting = Ranked()
        self.running = Ranked()
        self.claims = Claims(pools, models_of, fast_path, self.running)
        # Those of them that may become late, by deadline and arrival, the first one first.
        self._timed: list[tuple[float, int, Request]] = []
        self._arrivals = 0
        self._found: list[Found] = []
        self._preempted: list[Request] = []
        # The request that found no room last, and its claims; no blocks were given back since.
        self._stuck: tuple[Request, dict[str, int]] | None = None
        # Sequences of open generations that hold blocks and that no request uses now, by their identity, the
        # longest unused first.
        self._kept: dict[int, Sequence] = {}

    def add(self, request: Request) -> None:
        """Queue a request and make its sequences; those it brings along may be reclaimed until it runs."""
        request.rank = (request.priority, self._arrivals)
        self._arrivals += 1
        for role in request.facts.roles:
            if role not in request.sequences:
                request.sequences[role] = Sequence(
                    self._pool(role), request.prompts[role].ids, request.cache_salt
                )
        self.waiting.add(request)
        if request.deadline is not None:
            insort(self._timed, _timed(request.deadline, request))

    def blocks_needed(self, request: Request) -> dict[str, int]:
        """The most blocks of each model's pool that the request can own while it is the only one."""
        needed = dict.fromkeys(self.pools, 0)
        for role in request.facts.roles:
            needed[self.models_of[role]] += self._pool(role).blocks_for(request.max_sequence(role))
        return needed

    def admit(self) -> list[Request]:
        """Move requests from the head of the queue to the running ones while there is room."""
        admitted: list[Request] = []
        self.claims.forget()
        # They leave the queue together: so what is behind them moves up once.
        while len(admitted) < len(self.waiting) and self._fits(self.waiting[len(admitted)]):
            request = self.waiting[len(admitted)]
            for sequence in request.sequences.values():
                self.take(sequence)
            self.running.add(request)
            admitted.append(request)
        del self.waiting[: len(admitted)]
        return admitted

    @property
    def in_python(self) -> list[Request]:
        """The running requests that nobody carries."""
        if len(self.fast_path) == len(self.running):
            return []
        return [request for request in self.running if not request.is_carried]

    def is_needed(self, model: str) -> bool:
        """Whether a running request waits for the model."""
        if len(self.fast_path) and self.fast_path.ready(model):
            return True
        return any(self.models_of[request.need_now.role] == model for request in self.in_python)

    @property
    def late(self) -> list[Request]:
        """Those whose time is over."""
        late = []
        for _, _, request in self._timed:
            if not request.is_late:
                break
            late.append(request)
        return late

    def keep(self, sequence: Sequence) -> None:
        """Leave a sequence its blocks while nobody uses it, until they are needed elsewhere."""
        self._stuck = None
        self._kept[id(sequence)] = sequence

    def take(self, sequence: Sequence) -> None:
        """A kept sequence is in use again, or gone."""
        self._kept.pop(id(sequence), None)

    def retire(self, request: Request) -> None:
        """Take a finished request out, wherever it stands; siblings that wait for its prompt take it over."""
        self._stuck = None
        (self.running if request in self.running else self.waiting).remove(request)
        if request.deadline is not None:
            del self._timed[bisect_left(self._timed, _timed(request.deadline, request))]
        for sibling in request.siblings:
            if sibling in self.running and not sibling.is_finished:
                for role in request.sequences:
                    self._take_prompt(sibling, role, request)
        request.siblings = ()
        self._found = [found for found in self._found if found.request is not request]

    def schedule(self, model: str) -> SchedulerOutput:
        """What the running requests now need of one model: at most `max_batch_tokens` tokens.

        Who cannot have the blocks for its tokens waits for another step; one that is the only one left and
        still lacks a block fails with OutOfBlocks.
        """
        ends = self._beside_carried(model)
        works = []
        for request in tuple(self.running) if ends else ():
            if request not in ends or request in self._preempted:
                continue
            work = self._own_blocks(request, ends[request])
            if work is not None:
                works.append(work)
        output = SchedulerOutput(works, self._found, self._preempted)
        self._found, self._preempted = [], []
        return output

    def _beside_carried(self, model: str) -> dict[Request, int]:
        """Plan the carried requests, and share the rest of the budget among the others.

        Where tokens or blocks do not suffice for all, ranks decide, and nobody is carried.
        """
        if not len(self.fast_path):
            return self._share_tokens(model) or {}
        planned = self.fast_path.plan(model)
        carried = len(self.fast_path)
        ends = self._share_tokens(model, planned.tokens)
        # A request that shares a prompt with a carried one has taken it back.
        if ends is None or len(self.fast_path) != carried or self._lacks_blocks(model, planned, ends):
            self.fast_path.hand_back_planned()
            return self._share_tokens(model) or {}
        self.fast_path.own()
        return ends

    def _lacks_blocks(self, model: str, planned: Planned, ends: dict[Request, int]) -> bool:
        """Whether blocks for all tokens and the paths behind them are not there."""
        missing = planned.missing
        for request, end in ends.items():
            need = request.need_now
            sequence = request.sequences[need.role]
            missing += sequence.block_table.missing(sequence.num_computed, end + need.ahead)
        return missing > self.pools[model].num_available

    def _find_computed(self, request: Request) -> bool:
        """Let the request go on from what is computed already.  False: it waits, while a sibling that ranks
        above it reads their prompt.
        """
        need = request.need_now
        sequence = request.sequences[need.role]
        if request.siblings and sequence.num_computed < sequence.prompt_len - 1:
            if self._is_being_read(request, need.role):
                return False
            for sibling in request.siblings:
                self._take_prompt(request, need.role, sibling)
        start = sequence.num_computed
        if sequence.take_cached(need.first - 1):
            self._note(request, need.role, start)
        return True

    def _take_prompt(self, request: Request, role: str, sibling: Request) -> None:
        """Share what a sibling has computed of the prompt, where it is more than the request has."""
        sequence, source = request.sequences[role], sibling.sequences.get(role)
        limit = sequence.prompt_len - 1
        if request.need_now.role == role:
            # A row is never shared: the token before it is computed in any case.
            limit = min(limit, request.need_now.first - 1)
        start = sequence.num_computed
        if source is not None and min(source.num_computed, limit) > start:
            sequence.take_from(source, limit)
            self._note(request, role, start)

    def _is_being_read(self, request: Request, role: str) -> bool:
        """Whether a running sibling above `request` computes their prompt for the same role now."""
        for other in request.siblings:
            if other.rank < request.rank and other in self.running and other.need_now.role == role:
                return other.sequences[role].num_computed < request.sequences[role].prompt_len - 1
        return False

    def _note(self, request: Request, role: str, start: int) -> None:
        """Report and count what a sequence has found behind `start`."""
        sequence = request.sequences[role]
        self._found.append(Found(request, role, start, sequence.num_computed))
        if not request.counters.preemptions:
            request.counters.cached += max(min(sequence.num_computed, sequence.prompt_len) - start, 0)

    def _share_tokens(self, model: str, reserved: int = 0) -> dict[Request, int] | None:
        """Up to which token each running request that needs the model computes in this step, if it is not
        carried.  None where `reserved` tokens of the budget do not leave enough for texts.

        Texts are written before prompts are read, each in order of rank; but long needs together get a
        PROMPT_SHARE of the budget.  So a prompt of P tokens behind others of Q, whatever else runs, is read
        in at most ceil((P + Q) / share) steps that it has memory for.
        """
        short: list[Request] = []
        long: list[Request] = []
        others = self.in_python
        if not others and reserved <= self.max_batch_tokens:
            return {}
        for request in others:
            need = request.need_now
            if self.models_of[need.role] != model or not self._find_computed(request):
                continue
            if _pending(request) > DECODE_TOKENS:
                request.long_need = (need.role, need.first)
            # What began as a long need stays one to its last token.  A budget of one token cannot be shared.
            is_long = request.long_need == (need.role, need.first) and self.max_batch_tokens > 1
            (long if is_long else short).append(request)
        ends: dict[Request, int] = {}
        share = max(int(PROMPT_SHARE * self.max_batch_tokens), 1)
        share = min(share, sum(map(_pending, long)))
        left = self.max_batch_tokens - share - reserved
        if reserved and left < sum(map(_pending, short)):
            return None
        left = self._spend(short, left, ends)
        self._spend(long, left + share, ends)
        return ends

    def _spend(self, requests: list[Request], left: int, ends: dict[Request, int]) -> int:
        """Give `requests` the tokens they need, in order, while `left` lasts; returns what is left then."""
        for request in requests:
            count = min(_pending(request), left)
            if count > 0:
                ends[request] = request.sequences[request.need_now.role].num_computed + count
                left -= count
        return left

    def _own_blocks(self, request: Request, end: int) -> Work | None:
        """The request's work up to `end` with the blocks it writes, lower-ranked requests' if need be."""
        need = request.need_now
        sequence = request.sequences[need.role]
        start, pool = sequence.num_computed, self._pool(need.role)
        while sequence.block_table.missing(start, end) > pool.num_available:
            if self._release_idle(pool):
                continue
            victim = self._lowest_holder(pool, above=request)
            if victim is not None:
                self._preempt(victim)
            elif request is self.running[0]:
                # Nobody else holds a block: if one is missing still, prepare_write says so.
                break
            else:
                return None
        try:
            copies = sequence.prepare_write(start, end)
        except OutOfBlocks as error:
            request.fail(error)
            return None
        ahead = need.ahead if end == need.last else 0
        return Work(request, need.role, start, end, need.first, ahead, tuple(copies))

    def _fits(self, request: Request) -> bool:
        """Whether there is room for the request now; looked for again only where there may be more than last
        time: running texts take up what they claim, and claim no less.
        """
        claim = self.claims.of(request)
        if self._stuck == (request, claim):
            return False
        fits = self._make_room(request, claim)
        self._stuck = None if fits else (request, claim)
        if fits:
            self.claims.admit(claim)
        return fits

    def _make_room(self, request: Request, claim: dict[str, int]) -> bool:
        """Whether every pool holds what the request claims, beside those that outrank it.

        Idle caches are released for it, and lower-ranked running requests preempted, if that is enough.
        """
        while True:
            free = {model: pool.num_available for model, pool in self.pools.items()}
            short = self.claims.short(claim, self.claims.of_running(), free)
            if not short:
                return True
            if any(self._release_idle(pool, but=request) for pool in short):
                continue
            higher = self.running[: self.running.num_above(request)]
            if len(higher) == len(self.running):
                return False
            free = self._free_beside([*higher, request])
            if self.claims.short(claim, self.claims.of_all(higher), free):
                return False
            self._preempt(self.running[-1])

    def _free_beside(self, requests: list[Request]) -> dict[str, int]:
        """How many blocks of each pool would be free if only `requests` held any."""
        held: dict[str, set[int]] = {model: set() for model in self.pools}
        for request in requests:
            for role, sequence in request.sequences.items():
                held[self.models_of[role]].update(sequence.block_table.ids)
        return {model: pool.total - len(held[model]) for model, pool in self.pools.items()}

    def _lowest_holder(self, pool: BlockPool, above: Request) -> Request | None:
        """The lowest-ranked running request below `above` that holds blocks of the pool."""
        for request in reversed(self.running[self.running.num_above(above) + 1 :]):
            tables = (sequence.block_table for sequence in request.sequences.values())
            if any(table.pool is pool and table.ids for table in tables):
                return request
        return None

    def _release_idle(self, pool: BlockPool, but: Request | None = None) -> bool:
        """Release the longest unused kept sequence that holds blocks of the pool and is not `but`'s own;
        False where there is none.
        """
        own = [] if but is None else list(but.sequences.values())
        for sequence in self._kept.values():
            if any(sequence is mine for mine in own):
                continue
            if sequence.block_table.pool is pool and sequence.block_table.ids:
                sequence.release()
                # What holds nothing is not looked at again.
                self.take(sequence)
                self.claims.forget()
                return True
        return False

    def _preempt(self, request: Request) -> None:
        """Back to the queue without blocks; text, rows and need stay."""
        self._stuck = None
        self.claims.forget()
        self.running.remove(request)
        for sequence in request.sequences.values():
            sequence.register()
            sequence.release()
        request.counters.preemptions += 1
        self._preempted.append(request)
        self.waiting.add(request)

    def _pool(self, role: str) -> BlockPool:
        return self.pools[self.models_of[role]]


def _pending(request: Request) -> int:
    """How many tokens the request's need asks for."""
    need = request.need_now
    return need.last - request.sequences[need.role].num_computed


def _timed(deadline: float, request: Request) -> tuple[float, int, Request]:
    return deadline, request.rank[1], request
