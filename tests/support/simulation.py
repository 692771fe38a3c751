"""Whole lives of a server from one seed each: `python -m tests.support.simulation --seed N` replays one.

A life is a random small server and what its clients do to it: requests of all policies under unlike
parameters, cancelled or not, open texts that are extended, forked and rewound.  After every step
of the engine all invariants are checked, and at its end everything must be as it was at the beginning.
"""

import argparse
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, ClassVar
from zlib import crc32

from nudging import BadRequest, Base, Guide, Nudging, SamplingParams
from nudging.api.generation import Generation, extended
from nudging.api.handle import Handle
from nudging.api.outputs import Stats
from nudging.core.block_pool import BlockPool
from nudging.core.request import Request
from nudging.core.scheduler import Scheduler
from nudging.core.work import SchedulerOutput
from nudging.errors import DeadlineExceeded, NumericalError
from nudging.policies.forced import Forced
from nudging.policies.protocol import Policy, Step, View
from tests.support.simulated import (
    VOCAB,
    Expected,
    InlineThread,
    NotFinite,
    Setup,
    SimLLM,
    expect,
    expect_scores,
)

# What two lives of one seed have in common: all that an output cost, but for the time.
COUNTED = attrgetter(*[field.name for field in fields(Stats) if not field.name.endswith("_ms")])


@dataclass
class Job:
    """One handle, what its requests must write, and what a client has read of it so far."""

    handle: Handle
    requests: list[Request]
    expected: list[Expected]
    # The turn by which it must have ended.
    bound: int
    may_fail: bool = False
    is_cancelled: bool = False
    is_read: bool = True
    generation: Generation | None = None
    # Whether what it writes becomes text.
    is_text: bool = True
    checked: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ends: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.requests)
        self.checked, self.ids = [0] * n, [[] for _ in range(n)]
        self.texts, self.ends = [""] * n, [None] * n


class World:
    """A server in the hands of clients who check everything."""

    def __init__(self, setup: Setup, stride: int = 1, llm: SimLLM | None = None) -> None:
        """`llm`: of that setup, if it is not to be made here; `stride`: after how many turns the engine
        itself is looked at; after every other look everyone who is carried is taken back.
        """
        self.llm = llm or SimLLM(setup)
        self.stride = stride
        self.engine = self.llm._engine
        assert isinstance(self.llm._thread, InlineThread)
        self.thread = self.llm._thread
        self._victims: list[Request] = []
        self.engine.scheduler.schedule = self._schedule  # type: ignore[method-assign]
        self.jobs: list[Job] = []
        # The arrival of each request that has not ended.
        self._arrivals: dict[str, int] = {}
        self._num_arrived = 0
        self.generations: list[Generation] = []
        self.turns = 0
        # How requests ended, those that were late counted apart.
        self.finished = dict.fromkeys(("stop", "length", "abort", "error", "late"), 0)
        self.preemptions = 0
        self.digest = 0
        # What a request may end with where a fault was planted.
        self.excused: type[Exception] | None = None

    def submit(
        self,
        prompt: Any,
        params: SamplingParams,
        policy: Policy,
        speculate: str | int = "auto",
        is_read: bool = True,
        **options: Any,
    ) -> Job:
        """Start a request.  Raises BadRequest where the server refuses it."""
        handle = self.llm.submit(prompt, params, policy, speculate, **options)
        return self._watch(Job(handle, handle._requests, [], 0, is_read=is_read))

    def extend(self, generation: Generation, params: SamplingParams) -> Job:
        """Let an open text go on.  Raises BadRequest where its context is full."""
        handle = generation._start(params, generation.policy)
        return self._watch(Job(handle, handle._requests, [], 0, generation=generation))

    def score(self, generation: Generation, ids: list[int]) -> Job:
        """Let a text be read as it might go on.  Raises BadRequest where its context is full."""
        handle = generation.begin_score(ids)
        return self._watch(Job(handle, handle._requests, [], 0, generation=generation, is_text=False))

    def leave(self, generation: Generation) -> None:
        """Its call is left by an exception: what it has written is dropped, and the next call may come."""
        before = (generation.token_ids, generation.authors)
        self._let_go(generation)
        generation.leave()
        assert (generation.token_ids, generation.authors) == before

    def forget(self, generation: Generation) -> None:
        """Drop it as it stands, open, and perhaps written on."""
        self._let_go(generation)
        self.generations.remove(generation)

    def _let_go(self, generation: Generation) -> None:
        for job in self.jobs:
            if job.generation is generation:
                job.is_cancelled, job.generation = True, None

    def _watch(self, job: Job) -> Job:
        for request in job.requests:
            self._arrivals[request.id] = self._num_arrived
            self._num_arrived += 1
            job.may_fail |= isinstance(request.policy, Broken) or not self._fits(request)
            job.expected.append(
                Expected([], [], "error", None)
                if isinstance(request.policy, Broken)
                else expect_scores(self.llm, request)
                if isinstance(request.policy, Forced)
                else self.expect(request)
            )
        self.jobs.append(job)
        waiting = (request for other in self.jobs for request in other.requests)
        job.bound = self.turns + sum(map(most_turns, waiting))
        for other in self.jobs:
            if other.requests[0].priority > job.requests[0].priority:
                other.bound += sum(map(most_turns, job.requests))
        return job

    def expect(self, request: Request) -> Expected:
        """What the request must write: up to a row that is not finite, where the text comes to one."""
        try:
            return expect(self.llm, request, request.seed)
        except NotFinite:
            return self._expect_up_to_nan(request)

    def _expect_up_to_nan(self, request: Request) -> Expected:
        whole, before = request.max_tokens, Expected([], [], "error", None, error=NumericalError)
        try:
            for length in range(1, whole):
                request.max_tokens = length
                written = expect(self.llm, request, request.seed)
                if written.finish_reason == "stop":
                    return written
                before = replace(written, finish_reason="error", error=NumericalError)
        except NotFinite:
            return before
        finally:
            request.max_tokens = whole
        return before

    def _fits(self, request: Request) -> bool:
        try:
            self.engine.check_fits(request)
        except BadRequest:
            return False
        return True

    def cancel(self, job: Job) -> None:
        job.is_cancelled = True
        job.handle.cancel()

    def open(self, prompt: Any, policy: Policy, **options: Any) -> Generation:
        generation = self.llm.open(prompt, policy, **options)
        self.generations.append(generation)
        return generation

    def fork(self, generation: Generation) -> Generation:
        fork = generation.fork()
        self.generations.append(fork)
        return fork

    def close(self, generation: Generation) -> None:
        self._let_go(generation)
        generation.close()
        self.generations.remove(generation)

    def preempt(self, request: Request) -> None:
        """In the next step, take a running request's blocks away as if a higher-ranked one needed them."""
        self._victims.append(request)

    def _schedule(self, model: str) -> SchedulerOutput:
        scheduler = self.engine.scheduler
        for victim in self._victims:
            if victim in scheduler.running:
                scheduler._preempt(victim)
        self._victims.clear()
        return Scheduler.schedule(scheduler, model)

    def is_idle(self, generation: Generation) -> bool:
        return all(job.generation is not generation for job in self.jobs)

    def turn(self) -> None:
        """One turn of the engine's thread, and then everything is checked."""
        had_work = bool(self.engine.has_work)
        began = self.llm.clock.now
        before = self._progress() if had_work else None
        self.thread.turn()
        self.turns += 1
        assert not had_work or self._progress() != before, "a step moved nobody"
        for job in self.jobs:
            for request in job.requests:
                late = request.deadline is not None and began >= request.deadline
                assert request.is_finished or not late, f"{request.id} goes on after its time"
        self.check()

    def _sums(self) -> list[float]:
        """What is written down of costs, but for the order of the sums over requests.

        Where the caller fixed the length of drafts nobody reads the books.
        """
        accounts = list(self.engine._accounts.values())
        read = [one for one in self.engine._ledgers.values() if any(one.account is a for a in accounts)]
        books, owed = [*read, *accounts], [account.owed for account in accounts]
        sums = [number for one in books for number in (one.lazy, one.paid, one.agreement)]
        # Nothing left over may have either sign.
        return [round(number, 9) + 0.0 for number in (*sums, *owed)]

    def _progress(self) -> tuple[int, int, int]:
        """Something that changes with whatever a step does."""
        scheduler = self.engine.scheduler
        passes = sum(runner.passes for runner in self.llm.runners)
        return passes, len(scheduler.waiting), len(scheduler.running)

    def drain(self) -> None:
        """Run until nothing is left; then the server must be as it was when it opened."""
        while self.jobs or not self.thread.loop.commands.empty():
            self.turn()
        for generation in list(self.generations):
            self.close(generation)
        assert_untouched(self.llm)

    def check(self) -> None:
        self._check_order()
        if self.turns % (2 * self.stride) == 0:
            for request in self.engine.scheduler.running:
                request.bring_back()
        if self.turns % self.stride == 0:
            self.engine.check()
            check_holders(self.llm, self._tables())
        for job in list(self.jobs):
            is_finished = job.handle.is_finished
            for i, request in enumerate(job.requests):
                self._check_progress(job, i, request)
            if job.is_read or is_finished:
                self._read(job)
            if is_finished:
                self.jobs.remove(job)
                self._check_end(job)
            assert self.turns < job.bound, f"{job.handle.request_id} still waits after {self.turns} turns"

    def _check_order(self) -> None:
        """First come, first served, among those of one priority."""
        for queue in (self.engine.scheduler.running, self.engine.scheduler.waiting):
            ranks = [(request.priority, self._arrivals[request.id]) for request in queue]
            assert ranks == sorted(ranks), f"served out of order: {ranks}"

    def _tables(self) -> Iterator[tuple[BlockPool, list[int]]]:
        """Every table of blocks there is: its pool and its blocks."""
        engine, sequences = self.engine, {}
        for request in (*engine.scheduler.running, *engine.scheduler.waiting):
            if request.is_carried:
                for role, track in engine.fast_path.look(request).items():
                    yield engine.runners[engine.models_of[role]].pool, track.blocks
            else:
                sequences.update({id(sequence): sequence for sequence in request.sequences.values()})
        for generation in self.generations:
            sequences.update({id(sequence): sequence for sequence in generation._caches.sequences.values()})
        for sequence in sequences.values():
            yield sequence.block_table.pool, sequence.block_table.ids

    def _check_progress(self, job: Job, i: int, request: Request) -> None:
        """What is written is the beginning of what must be written."""
        request.read_carried()
        pieces = request.pieces
        length = len(pieces)
        want = job.expected[i].token_ids
        if length != job.checked[i] and want is not None and not isinstance(request.policy, Broken):
            before = job.checked[i]
            output = [piece.token for piece in pieces[before:]]
            assert length > before, f"{request.id}: what was written is gone"
            assert output == want[before:length], f"{request.id}: {output}, not {want[before:length]}"
            job.checked[i] = length

    def _read(self, job: Job) -> None:
        """Take what came, as a client who streams does."""
        for i in range(len(job.requests)):
            delta = job.handle.take(i, len(job.ids[i])) if job.ends[i] is None else None
            if delta is not None:
                job.ids[i] += delta.token_ids
                job.texts[i] += delta.text
                job.ends[i] = delta.finish_reason

    def _check_end(self, job: Job) -> None:
        outputs = job.handle.result(timeout=0).outputs
        for i, (request, output, want) in enumerate(zip(job.requests, outputs, job.expected, strict=True)):
            late = isinstance(output.error, DeadlineExceeded)
            self.finished["late" if late else output.finish_reason] += 1
            self.preemptions += output.stats.preemptions
            seen = (
                self.turns,
                i,
                output.token_ids,
                output.finish_reason,
                COUNTED(output.stats),
                self._sums(),
            )
            self.digest = crc32(repr(seen).encode(), self.digest)
            del self._arrivals[request.id]
            ended = self.thread.loop.ends.pop(request.id, 0)
            assert ended == 1, f"{request.id} ended {ended} times"
            assert job.ids[i] == list(output.token_ids), "the stream and the result differ"
            assert job.texts[i] == (output.text or ""), "the stream and the result differ"
            assert job.ends[i] == output.finish_reason
            if self._may_end_otherwise(job, request):
                continue
            if want.finish_reason == "error":
                assert isinstance(output.error, want.error), (request.id, output)
                assert want.token_ids is None or list(output.token_ids) == want.token_ids
                continue
            assert output.error is None, (request.id, output.error)
            assert output.finish_reason == want.finish_reason, (request.id, output, want)
            assert output.text == want.text, (request.id, output, want)
            if want.token_ids is not None:
                assert list(output.token_ids) == want.token_ids
                assert list(output.authors) == want.authors
                assert list(output.logprobs or ()) == want.logprobs
        if job.generation is not None and job.is_text and outputs[0].error is None:
            extended(job.generation, job.handle.result())

    def _may_end_otherwise(self, job: Job, request: Request) -> bool:
        if isinstance(request.policy, Broken) or (request.error is not None and job.may_fail):
            return True
        if self.excused is not None and isinstance(request.error, self.excused):
            return True
        if isinstance(request.error, DeadlineExceeded):
            assert request.is_late, f"{request.id} ended before its time"
            return True
        return request.finish_reason == "abort" and job.is_cancelled

    def close_server(self) -> None:
        """Close it as it stands; nothing may be left."""
        for job in self.jobs:
            job.is_cancelled = True
        self.thread.close()
        self.check()
        for generation in self.generations:
            generation.close()


def most_turns(request: Request) -> int:
    """More turns than a request can take while nobody else is served."""
    rounds = request.max_tokens + 1 if request.policy.shares_ids else 2000
    return sum(len(prompt.ids) for prompt in request.prompts.values()) + 70 * rounds


def check_holders(llm: SimLLM, tables: Iterable[tuple[BlockPool, list[int]]]) -> None:
    """Assert that every block is held exactly as often as the pools say, counted from the tables."""
    pools = [runner.pool for runner in llm._engine.runners.values()]
    held = {id(pool): [0] * pool.total for pool in pools}
    for pool, blocks in tables:
        counts = held[id(pool)]
        for block in blocks:
            counts[block] += 1
    for pool in pools:
        assert held[id(pool)] == pool._references, "references are not the number of holders"


def assert_untouched(llm: SimLLM) -> None:
    """Assert that nothing is left of anything."""
    engine = llm._engine
    for runner in engine.runners.values():
        runner.pool.check()
        assert runner.pool.num_available == runner.pool.total, (
            f"{runner.pool.total - runner.pool.num_available} blocks leak"
        )
    scheduler = engine.scheduler
    left = (scheduler.running, scheduler.waiting, scheduler._kept, scheduler._found, scheduler._preempted)
    assert not any(left), f"left behind: {left}"
    left = (engine._views, engine._ledgers)
    assert not any(left), f"left behind: {left}"
    assert not llm._thread.loop.jobs
    assert llm._thread.loop.commands.empty()


@dataclass(frozen=True)
class Broken:
    """A caller's own policy that goes wrong after a few tokens."""

    how: str
    after: int

    roles: ClassVar[tuple[str, ...]] = ("base",)
    lookahead: ClassVar[int] = 0
    shares_ids: ClassVar[bool] = True
    needs_tokenizer: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    def start(self) -> int:
        return 0

    def step(self, view: View, state: int) -> Step:
        row = view.row("base")
        if state < self.after:
            return Step((row.token,), "base", state=state + 1)
        if self.how == "raises":
            raise RuntimeError("this policy is broken")
        if self.how == "writes no id":
            return Step((VOCAB + 99,), "base")
        return Step(state=state)


def random_setup(rng: random.Random, pace: int) -> Setup:
    """Small servers of every shape; texts are `pace` times as long as the shortest."""
    block_size = rng.choice([1, 2, 3, 4, 8])
    # From where two ordinary requests get in each other's way to where none does.
    room = (pace + 1) // 2
    tokens = room * rng.choice([60, 90, 140, 200, 400, 1000])
    return Setup(
        block_size=block_size,
        blocks=(tokens // block_size, rng.choice([tokens, tokens, 90 * room]) // block_size),
        max_batch_tokens=rng.choice([1, 3, 8, 16, 64, 2048]),
        max_len=rng.choice([48, 160, 4096]),
        one_model=rng.random() < 0.15,
        padding=rng.choice([0, 3]),
        agreement=rng.choice([4, 11, 15]),
        has_text=rng.random() < 0.9,
        prefix_caching=rng.random() < 0.8,
        drafter=rng.choice(["guide", "guide", "ngram", "none"]),
        nan_in=rng.choice([0, 0, 0, 0, 100]),
    )


class Life:
    """What happens to one server, all of it from one seed."""

    def __init__(self, seed: int, carries: bool) -> None:
        self.rng = random.Random(seed)
        # In some lives texts are longer and clients come more seldom, by so much: there C++ carries them far.
        self.pace = self.rng.choice(PACES)
        self.setup = replace(random_setup(self.rng, self.pace), carries=carries)
        self.world = World(self.setup, STRIDES[seed % len(STRIDES)])
        self.crowd = self.rng.choice([1, 3, 5, 8])
        # Requests that use all the memory that is reserved for them: no look-ahead, no drafts, no early end.
        self.is_lean = self.rng.random() < 0.3
        self.refused = 0
        self.known: list[list[int]] = [[2, 3]]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.disturb()
            self.world.turn()
        self.world.drain()

    def disturb(self) -> None:
        """What clients do between two turns."""
        rng, world = self.rng, self.world
        comes = rng.random() < (0.6 / self.pace if world.jobs else 0.6)
        if comes and len(world.jobs) < self.crowd:
            self._try(self._submit)
        if world.jobs and rng.random() < 0.03 / self.pace:
            world.cancel(rng.choice(world.jobs))
        if rng.random() < 0.15 / self.pace:
            self._try(self._use_a_generation)

    def _try(self, action: Any) -> None:
        try:
            action()
        except BadRequest:
            self.refused += 1

    def _submit(self) -> None:
        rng = self.rng
        speculate = "off" if self.is_lean else rng.choice(["auto", "auto", "off", rng.randrange(16)])
        policy, params = self._policy(), self._params()
        is_read = rng.random() < 0.5
        self.world.submit(self._prompt(policy), params, policy, speculate, is_read, **self._options())

    def _use_a_generation(self) -> None:
        rng, world = self.rng, self.world
        idle = [generation for generation in world.generations if world.is_idle(generation)]
        if not idle or (len(world.generations) < 4 and rng.random() < 0.2):
            policy = self._policy()
            world.open(self._prompt(policy), policy, **self._options())
            return
        generation = rng.choice(idle)
        action = rng.random()
        if action < 0.5:
            world.extend(generation, self._params(n=1))
        elif action < 0.65 and len(world.generations) < 4:
            world.fork(generation)
        elif action < 0.8:
            generation.rewind(rng.randint(0, len(generation.token_ids)))
        elif action < 0.9:
            generation.extend(text=self._ids(3))
        else:
            world.close(generation)

    def _ids(self, most: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB) for _ in range(self.rng.randint(1, most))]

    def _prompt(self, policy: Policy) -> Any:
        longest = self.rng.choice([3, 12, 30])
        ids = self._ids(longest)
        if self.rng.random() < 0.4:
            # The beginning of an earlier prompt: its blocks may be found.
            before = self.rng.choice(self.known)
            ids = [*before[: self.rng.randint(1, len(before))], *ids][:30]
        self.known = [*self.known[-4:], ids]
        if not policy.shares_ids:
            text = "".join(
                self.rng.choices(["a", " b", " the", " of", "?", "é", "12"], k=self.rng.randint(1, 9))
            )
            return {"base": text, "guide": text + "!"}
        return ids if self.rng.random() < 0.7 else {"base": ids, "guide": self._ids(longest)}

    def _policy(self) -> Policy:
        rng = self.rng
        kind = rng.random() * (0.28 if self.is_lean else 1.0)
        if kind < 0.15:
            return Base()
        if kind < 0.25:
            return Guide()
        if kind < 0.28:
            return Broken(rng.choice(["raises", "writes no id", "stands still"]), rng.randrange(4))
        threshold, comparator = rng.choice(self.thresholds), rng.choice(["<", "<="])
        granularity = "token" if kind < 0.7 or self.setup.nan_in else "word" if kind < 0.97 else "reference"
        return Nudging(threshold, granularity, comparator, overshoot=granularity == "reference")

    @property
    def thresholds(self) -> list[float]:
        """With rows that are not finite none above 1: the oracle reads the base's row all the same."""
        return [0.0, 0.25, 0.4, 0.4, 0.6] + [1.5] * (not self.setup.nan_in)

    def _options(self) -> dict[str, Any]:
        rng = self.rng
        timeout = self.pace * rng.uniform(1.0, 40.0) if rng.random() < 0.1 else None
        salt = rng.choice([None, None, None, "salt"])
        return {"priority": rng.choice([0, 0, 0, -1, 1]), "timeout": timeout, "cache_salt": salt}

    def _params(self, n: int | None = None) -> SamplingParams:
        rng = self.rng
        params = SamplingParams(
            max_tokens=self.pace * rng.choice([1, 2, 5, 12, 24]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_k=rng.choice([0, 0, 20]),
            seed=rng.getrandbits(64),
            stop=rng.choice([(), (), (), ("?",), (" a", "a of", "é"), "the"]) if self.setup.has_text else (),
            stop_token_ids=rng.choice([(), (), (5,), (9, 12)]),
            ignore_eos=self.is_lean or rng.random() < 0.3,
            logprobs=2 if rng.random() < 0.02 else None,
            logit_bias=rng.choice([None, None, None, {7: 4.0, 8: -1.0}]),
            n=n or rng.choice([1, 1, 1, 1, 1, 1, 2, 3]),
            include_stop_str_in_output=rng.random() < 0.2,
        )
        return self._in_python(params) if rng.random() < 0.15 else params

    def _in_python(self, params: SamplingParams) -> SamplingParams:
        """With what nobody who is carried has: what stands before a row decides about it."""
        rng = self.rng
        return replace(
            params,
            max_tokens=rng.choice([None, 12]) if self.setup.max_len < 200 else 12,
            min_tokens=rng.choice([0, 1, 3, 12]),
            presence_penalty=rng.choice([0.0, 0.5, -1.0, 2.0]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.25, 2.0]),
            repetition_penalty=rng.choice([1.0, 1.25, 0.75, 100.0]),
            bad_words=rng.choice([(), ("the", "é"), (" a b", "of the")]) if self.setup.has_text else (),
            allowed_token_ids=rng.choice([None, None, tuple(range(1, VOCAB, 2))]),
            skip_special_tokens=rng.random() < 0.5,
        )


STEPS = 100
PACES = (1, 1, 8)
STRIDES = (1, 3, 9, 40)


def live(seed: int, steps: int = STEPS, carries: bool = True) -> Life:
    """One life.  An error in it says how it is replayed."""
    life = Life(seed, carries)
    try:
        life.run(steps)
    except BaseException as error:
        where = "" if carries else " --in-python"
        error.add_note(
            f"replay with: python -m tests.support.simulation --seed {seed} --steps {steps}{where}"
        )
        raise
    return life


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--lives", type=int, default=1, help="how many seeds from there on")
    parser.add_argument("--steps", type=int, default=STEPS, help="turns before clients stop coming")
    parser.add_argument("--in-python", action="store_true", help="C++ carries nobody")
    options = parser.parse_args()
    began, turns, requests, preemptions = time.perf_counter(), 0, 0, 0
    for seed in range(options.seed, options.seed + options.lives):
        life = live(seed, options.steps, carries=not options.in_python)
        turns += life.world.turns
        requests += sum(life.world.finished.values())
        preemptions += life.world.preemptions
        if options.lives == 1:
            print(life.setup, life.world.finished, f"{life.refused} refused, digest {life.world.digest:08x}")
    seconds = time.perf_counter() - began
    print(f"{turns} turns, {requests} requests, {preemptions} preemptions in {seconds:.2f} s:", end=" ")
    print(f"{turns / seconds:.0f} turns/s")


if __name__ == "__main__":
    main()
