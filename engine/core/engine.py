"""plan -> execute -> decide -> commit: the only file that knows all parts.

A policy step asks for rows; the first missing one is the request's need.  `step` computes the needs of
all running requests, one ragged batch for each model, and lets every policy run on until its next need.
Catching up a lagging guide, prefill, decode and verifying drafts are the same thing: tokens that are not
computed yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from nudging.core.coscheduling import cap_paths, cheapest_first, longest_in_cycles, path_steps
from nudging.core.executor import Executor
from nudging.core.fast_path import FastPath
from nudging.core.guard import tell
from nudging.core.policy_view import MissingRow, RequestView
from nudging.core.prompt_logprobs import prompt_need, take_prompt_rows
from nudging.core.request import Request
from nudging.core.rows import Row, TokenLogprob
from nudging.core.scheduler import Scheduler
from nudging.core.speculation.drafting import draft_ahead, settle_draft
from nudging.core.speculation.ledger import Account, Ledger
from nudging.core.speculation.pass_costs import PassCosts, learn_cycle
from nudging.core.stats import EngineStats, Tally
from nudging.core.steps import Patience, check_step
from nudging.core.trace import Tracer
from nudging.core.wanted import Wanted, wanted_of
from nudging.core.work import SchedulerOutput, Work, describe
from nudging.errors import BadRequest, OutOfBlocks

# How fast the part of the requests that a pass serves follows the passes.
SHARE_SMOOTHING = 0.2
# After so many steps the models are ordered anew: which one is dearer hardly ever changes.
ORDER_STEPS = 32


class Engine:
    """Models, their pools, and the requests that share them.  Not thread-safe: one thread steps it."""

    def __init__(
        self,
        runners: Mapping[str, Executor],
        models_of: dict[str, str],
        max_batch_tokens: int = 2048,
        costs: Mapping[str, PassCosts] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        tracer: Tracer | None = None,
        carries: bool = True,
    ) -> None:
        """`carries`: ordinary steps are done in C++ (`fast_path.py`), else in Python, with the same results.
        `costs`: what passes of each model cost; None learns them from the passes that are made.
        `clock`: the seconds of now; passes and requests are timed with it.  `tracer`: is told where the time
        goes.
        """
        self.clock = clock
        self._tracer = tracer or Tracer()
        self._tally = Tally()
        # Called with every request that has ended, on the thread that steps.
        self.on_end: list[Callable[[Request], None]] = []
        self.runners: dict[str, Executor] = dict(runners)
        self._sampler = next(iter(runners.values())).sampler
        self.models_of = models_of
        pools = {name: runner.pool for name, runner in runners.items()}
        self.costs = costs or {
            name: PassCosts(runner.weight_bytes, runner.head_share) for name, runner in runners.items()
        }
        takes_fast_path = carries and all(runner.takes_fast_path for runner in runners.values())
        self.fast_path = FastPath(pools, models_of, self.costs, takes_fast_path)
        self.scheduler = Scheduler(pools, models_of, max_batch_tokens, self.fast_path)
        self._views: dict[str, RequestView] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._steps = 0
        self._order: list[str] = []
        # The part of the running requests that a pass of each model serves: all, where it is the dearest.
        self._share = dict.fromkeys(runners, 1.0)
        # Of the adaptive requests, by their drafter and their models.
        self._accounts: dict[tuple[str, ...], Account] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Request) -> None:
        """Queue a request that fits (see `check_fits`)."""
        self.scheduler.add(request)
        self._tracer.begin(request.id, policy=request.facts.name)

    def check_fits(self, request: Request) -> None:
        """Raise BadRequest when the pools could never hold the request, even alone."""
        for model, needed in self.scheduler.blocks_needed(request).items():
            pool = self.scheduler.pools[model]
            if needed > pool.total:
                raise BadRequest(
                    f"the request may need {needed * pool.block_size} tokens of cache in model {model!r}, "
                    f"which has {pool.total * pool.block_size}; shorten the prompt, lower max_tokens or "
                    "raise kv_cache_memory"
                )

    def abort(self, request: Request) -> None:
        """End a request wherever it stands; a finished one stays as it is."""
        if not request.is_finished:
            request.finish("abort")
            self._retire(request)

    def step(self) -> list[Request]:
        """Advance every running request; returns those that moved, the finished ones among them."""
        late = self._retire_late()
        with self._tracer.span("engine", "admit"):
            moved = [request for request in self.scheduler.admit() if request.id not in self._views]
            sharers = self._sharers if moved else {}
            for request in moved:
                self._open(request)
                self._advance(request, sharers)
            self._retire_finished()
        order = self._order_models()
        for model in order:
            if not self.scheduler.is_needed(model):
                continue
            with self._tracer.span("engine", "plan"):
                plan = self.scheduler.schedule(model)
                steps = self._path_steps(model, order[-1], plan.works)
            self._follow(plan)
            self._compute(model, order[-1], plan.works, steps)
            with self._tracer.span("engine", "decide and commit"):
                sharers = self._sharers
                answered = [*(work.request for work in plan.works), *self.fast_path.settle()]
                for request in sorted(answered, key=lambda one: one.rank):
                    moved += self._advance_carried(request, sharers)
                    self._advance(request, sharers)
                    moved.append(request)
                moved += self._advance_carried(None, sharers)
            moved += self._retire_finished()
        self._tracer.level(
            "requests", running=len(self.scheduler.running), waiting=len(self.scheduler.waiting)
        )
        if not self.has_work:
            self.check()
        return list(dict.fromkeys(late + moved))

    def _order_models(self) -> list[str]:
        """The models, cheapest first."""
        if self._steps % ORDER_STEPS == 0:
            self._order = cheapest_first(self.costs)
        self._steps += 1
        return self._order

    def stats(self) -> EngineStats:
        """How full the engine is and what it has done; callable from any thread, a step may be under way.

        Of a running text the last few tokens may be missing; once it has ended, none is.
        """
        totals = self._tally.totals()
        # A close may take the runners away meanwhile.
        runners = dict(self.runners)
        pools = {name: runner.pool for name, runner in runners.items()}
        usage = {name: 1 - pool.num_available / pool.total for name, pool in pools.items()}
        precision = {name: runner.precision for name, runner in runners.items()}
        return EngineStats(len(self.scheduler.running), len(self.scheduler.waiting), usage, precision, totals)

    def close(self) -> None:
        """Give all memory back; nothing may run any more."""
        self._tracer.close()
        runners, self.runners = self.runners, {}
        for runner in runners.values():
            runner.close()

    def check(self) -> None:
        """Assert I1 and I2 of everything."""
        for request in self.scheduler.running:
            request.check()
        for runner in self.runners.values():
            runner.pool.check()

    def _open(self, request: Request) -> None:
        costs = {role: self.costs[self.models_of[role]] for role in request.facts.roles}
        ledger = self._ledgers[request.id] = Ledger(costs, self._account(request))
        self._views[request.id] = RequestView(request, ledger, self._sampler)
        self._tally.begin(request)

    def _follow(self, plan: SchedulerOutput) -> None:
        """Keep the ledgers true to what was found and lost."""
        for found in plan.found:
            self._ledgers[found.request.id].spare(found.role, found.end, found.end - found.start)
        for request in plan.preempted:
            for role in request.facts.roles:
                # Lazy would have to read its text again, too.
                self._ledgers[request.id].rewind(role, 0)

    def _account(self, request: Request) -> Account:
        """Where the request's costs are promised: nowhere else, if the caller fixed the length of drafts."""
        if request.draft_len is not None:
            return Account()
        models = (self.models_of[role] for role in request.facts.roles)
        return self._accounts.setdefault((request.drafter, *models), Account())

    @property
    def _sharers(self) -> dict[str, float]:
        """How many requests share a pass of each model: of the dearest one's all that run, of another's as
        many of them as on average.
        """
        running = len(self.scheduler.running)
        return {model: max(share * running, 1.0) for model, share in self._share.items()}

    def _path_steps(self, model: str, dearest: str, works: list[Work]) -> int:
        """How many tokens of their paths the works get in this step; see `path_steps`."""
        lengths = [work.ahead + 1 for work in works] + self.fast_path.path_lengths()
        if max(lengths, default=1) == 1:
            return 1
        if model == dearest:
            return max(min(lengths), longest_in_cycles(works))
        needs = [request.need for request in self.scheduler.in_python if request.need is not None]
        ready = self.fast_path.ready(dearest) + sum(self.models_of[need.role] == dearest for need in needs)
        answered = ready + len(lengths)
        costs = self.costs[model].of(len(lengths), len(lengths)), self.costs[dearest].of(answered, answered)
        return max(path_steps(lengths, ready, *costs), longest_in_cycles(works))

    def _compute(self, model: str, dearest: str, works: list[Work], steps: int) -> None:
        """Run a model on its works and then on their paths, `steps` passes in all."""
        running = len(self.scheduler.running)
        works = cap_paths(works, self._ledgers, steps, running)
        self.fast_path.cap_paths(steps, running)
        shared, passes = 0, 0
        while works or self.fast_path.num_planned:
            shared += len(works) + self.fast_path.num_planned
            self._execute(model, works)
            passes += 1
            works = [onward for work in works if (onward := self._onward(work)) is not None]
            self.fast_path.onward()
        if passes and model != dearest:
            share = shared / passes / running
            self._share[model] += SHARE_SMOOTHING * (share - self._share[model])

    def _onward(self, work: Work) -> Work | None:
        """The next token of a work's path: the one that its last row picked; None where the path ends."""
        request, role, at = work.request, work.role, work.end
        if work.ahead == 0 or request.is_finished:
            return None
        sequence = request.sequences[role]
        row = sequence.rows.get(at)
        if not isinstance(row, Row) or row.token in request.need_now.ends:
            return None
        self._ledgers[request.id].rewind(role, sequence.set_context(at, (row.token,)))
        try:
            copies = sequence.prepare_write(at, at + 1)
        except OutOfBlocks:
            # The rest becomes a need of its own, for which the scheduler finds the blocks.
            return None
        return Work(request, role, at, at + 1, at + 1, work.ahead - 1, tuple(copies), is_onward=True)

    def _execute(self, model: str, works: list[Work]) -> None:
        """Run one model's batch and file its rows in the sequences they belong to."""
        runner = self.runners[model]
        wanted = [want for work in works for want in self._wanted(work)]
        rows = sum(work.end - work.start for work in works)
        asked = sum(work.answers for work in works)
        fast_path = self.fast_path if self.fast_path.num_planned else None
        if fast_path is not None:
            rows, asked = rows + fast_path.num_tokens, asked + fast_path.num_answers
        began = self.clock()
        carried = dict if fast_path is None else fast_path.describe
        with self._tracer.span(model, "pass", lambda: describe(works, rows, carried())):
            answers = runner.execute(works, wanted, fast_path)
        seconds = self.clock() - began
        for work, answer in zip(works, answers, strict=True):
            if answer is None:
                continue
            self._ledgers[work.request.id].pay(work.role, work.end - work.start, work.answers)
            sequence = work.request.sequences[work.role]
            counters = work.request.counters
            counters.recomputed += sequence.computed(work.end)
            counters.passes[work.role] = counters.passes.get(work.role, 0) + 1
            # A row that is not finite counts where the policy comes to ask for it: a draft may hold one.
            sequence.rows.update(zip(range(work.first_row, work.end + 1), answer, strict=True))
            take_prompt_rows(work.request, self._sampler)
            if all(isinstance(row, Row) for row in answer):
                sequence.register()
        if runner.cycle_time is not None:
            roles = {role: self.costs[name] for role, name in self.models_of.items()}
            learn_cycle(roles, runner.cycle_time)
            runner.cycle_time = None
        # What was made is paid at the prices it was planned at; the fast path has paid already.
        if runner.passes_made:
            self.costs[model].record(rows, asked, seconds / runner.passes_made)
            self.fast_path.learned(model)

    def _wanted(self, work: Work) -> list[Wanted]:
        request = work.request
        return wanted_of(work, self._views[request.id].vocab_size(work.role))

    def _advance(self, request: Request, shared: Mapping[str, float]) -> None:
        """Go on with a request; whatever is raised for it, by its policy most of all, ends it alone."""
        try:
            self._run_on(request, shared)
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt and SystemExit are the policy's, too
            request.fail(error)

    def _run_on(self, request: Request, shared: Mapping[str, float]) -> None:
        """Run the policy until it finishes or misses a row."""
        view, ledger = self._views[request.id], self._ledgers[request.id]
        sharers = {role: shared[self.models_of[role]] for role in request.facts.roles}
        unread = None if request.is_finished else prompt_need(request, ledger, sharers)
        if unread is not None:
            request.need = unread
            return
        try:
            patience = Patience(request)
            while not request.is_finished:
                self._commit(request, request.policy.step(view, request.state))
                patience.check()
        except MissingRow as missing:
            request.need = draft_ahead(request, view, ledger, missing.need, sharers)
            self._check_need(request)
            self.fast_path.offer(request, ledger)

    def _advance_carried(self, before: Request | None, shared: Mapping[str, float]) -> list[Request]:
        """Let carried requests that rank above `before` run on, and do in Python what is not ordinary."""
        moved: list[Request] = []
        while len(self.fast_path):
            some, returned = self.fast_path.advance(before, shared)
            moved += some
            if returned is None:
                break
            self._advance(returned, shared)
            moved.append(returned)
        return moved

    def _check_need(self, request: Request) -> None:
        """End a request that would outgrow the blocks reserved for it, before it takes another one's."""
        role, last = request.need_now.role, request.need_now.end
        if last > request.max_sequence(role):
            request.fail(
                BadRequest(
                    f"the text takes {last} tokens of {role!r}, {request.max_sequence(role)} were reserved; "
                    "raise max_tokens, or look less far ahead"
                )
            )

    def _commit(self, request: Request, said: object) -> None:
        """Write what a step decided; after its last token the step's own end counts."""
        step = check_step(request, said, self._views[request.id].vocab_size)
        for token in step.tokens:
            if request.is_finished:
                break
            request.commit(token, step.author, self._logprob(request, token, step.author))
        if step.texts and not request.is_finished:
            base = request.roles["base"].tokenizer
            assert base is not None, "texts were written without a tokenizer"
            request.write_texts(step.texts, base, step.overshoots)
        if step.finish is not None and not request.is_finished:
            request.finish(step.finish)
        request.state = step.state

    def _logprob(self, request: Request, token: int, author: str) -> TokenLogprob | None:
        """The author's log-probability of the next token, where the request asks for it."""
        if request.params.logprobs is None or author not in request.sequences:
            return None
        sequence = request.sequences[author]
        row = sequence.rows.get(sequence.prompt_len + len(request.output))
        return (
            None
            if not isinstance(row, Row)
            else self._sampler.logprob(row.logits, token, request.params.logprobs)
        )

    def _retire_finished(self) -> list[Request]:
        finished = [request for request in self.scheduler.in_python if request.is_finished]
        for request in finished:
            self._retire(request)
        return finished

    def _retire_late(self) -> list[Request]:
        late = self.scheduler.late
        for request in late:
            request.expire()
            self._retire(request)
        return late

    def _retire(self, request: Request) -> None:
        if request.id in self._ledgers:
            ledger = self._ledgers.pop(request.id)
            settle_draft(request, ledger)
            ledger.close(request.finish_reason in ("stop", "length"))
        request.counters.finished_at = request.clock()
        self.scheduler.retire(request)
        self._tally.end(request)
        self._views.pop(request.id, None)
        request.need = None
        for sequence in request.sequences.values():
            if request.error is None:
                sequence.register()
            if request.keeps_sequences:
                self.scheduler.keep(sequence)
            else:
                sequence.release()
                # A held result need not hold logits.
                sequence.rows.clear()
        self._tracer.end(request.id, finish_reason=request.finish_reason, tokens=len(request.output))
        tell(tuple(self.on_end), request)
