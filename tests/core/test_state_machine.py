"""A server under any order of what clients may do to it; hypothesis shrinks what goes wrong."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nudging import BadRequest, Base, Guide, Nudging, SamplingParams
from nudging.api.generation import Generation
from nudging.policies.protocol import Policy
from tests.support.simulated import VOCAB, Setup
from tests.support.simulation import World

INDEX = st.integers(0, 10**6)
IDS = st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=12)
SETUPS = st.builds(
    Setup,
    block_size=st.integers(1, 4),
    blocks=st.tuples(st.integers(12, 60), st.integers(12, 60)),
    max_batch_tokens=st.sampled_from([1, 4, 64]),
    max_len=st.sampled_from([48, 256]),
    one_model=st.booleans(),
    drafter=st.sampled_from(["guide", "ngram", "none"]),
    prefix_caching=st.booleans(),
)
POLICIES: st.SearchStrategy[Policy] = st.one_of(
    st.just(Base()),
    st.just(Guide()),
    st.builds(Nudging, st.sampled_from([0.0, 0.4, 0.7]), st.sampled_from(["token", "word"])),
)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    stop=st.sampled_from([(), ("é",), ("a", "an")]),
    stop_token_ids=st.sampled_from([(), (5, 9)]),
    ignore_eos=st.booleans(),
)
OPTIONS = st.fixed_dictionaries({"priority": st.integers(-1, 1), "timeout": st.none() | st.floats(0.5, 20.0)})


class Server(RuleBasedStateMachine):
    """Every rule leaves all invariants true, and at the end nothing is left; see World."""

    @initialize(setup=SETUPS)
    def start(self, setup: Setup) -> None:
        self.world = World(setup)

    def pick(self, index: int, items: list[Any]) -> Any:
        return items[index % len(items)]

    def idle(self) -> list[Generation]:
        return [one for one in self.world.generations if self.world.is_idle(one)]

    def busy(self) -> list[Generation]:
        return [one for one in self.world.generations if not self.world.is_idle(one)]

    @rule(
        prompt=IDS,
        params=PARAMS,
        policy=POLICIES,
        speculate=st.sampled_from(["auto", "off", 1, 4]),
        options=OPTIONS,
    )
    def add(self, prompt: list[int], params: Any, policy: Policy, speculate: Any, options: Any) -> None:
        with suppress(BadRequest):
            self.world.submit(prompt, params, policy, speculate, **options)

    @rule(turns=st.integers(1, 5))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self.world.turn()

    @precondition(lambda self: self.world.jobs)
    @rule(index=INDEX)
    def abort(self, index: int) -> None:
        self.world.cancel(self.pick(index, self.world.jobs))

    @precondition(lambda self: self.world.jobs)
    @rule(index=INDEX)
    def stop_reading(self, index: int) -> None:
        self.pick(index, self.world.jobs).is_read = False

    @precondition(lambda self: self.world.engine.scheduler.running)
    @rule(index=INDEX)
    def preempt(self, index: int) -> None:
        self.world.preempt(self.pick(index, self.world.engine.scheduler.running))

    @rule(prompt=IDS, policy=POLICIES, options=OPTIONS)
    def open(self, prompt: list[int], policy: Policy, options: Any) -> None:
        if len(self.world.generations) < 4:
            with suppress(BadRequest):
                self.world.open(prompt, policy, **options)

    @precondition(lambda self: self.idle())
    @rule(index=INDEX, params=PARAMS)
    def extend(self, index: int, params: SamplingParams) -> None:
        with suppress(BadRequest):
            self.world.extend(self.pick(index, self.idle()), params)

    @precondition(lambda self: self.idle())
    @rule(index=INDEX, ids=IDS)
    def score(self, index: int, ids: list[int]) -> None:
        with suppress(BadRequest):
            self.world.score(self.pick(index, self.idle()), ids)

    @precondition(lambda self: self.busy())
    @rule(index=INDEX, params=PARAMS, again=st.booleans())
    def leave(self, index: int, params: SamplingParams, again: bool) -> None:
        """In the midst of an extension or a score, and perhaps go on at once."""
        generation = self.pick(index, self.busy())
        self.world.leave(generation)
        if again:
            with suppress(BadRequest):
                self.world.extend(generation, params)

    @precondition(lambda self: self.busy())
    @rule(index=INDEX)
    def use_while_it_writes(self, index: int) -> None:
        """One at a time: refused, and nothing is changed."""
        generation = self.pick(index, self.busy())
        if generation._live is None or generation._live.is_finished:
            return
        for use in (generation.extend, generation.fork, lambda: generation.rewind(0)):
            with pytest.raises(BadRequest, match="another call of this generation is under way"):
                use()

    @precondition(lambda self: self.world.generations)
    @rule(index=INDEX)
    def forget(self, index: int) -> None:
        self.world.forget(self.pick(index, self.world.generations))

    @precondition(lambda self: self.busy())
    @rule(index=INDEX)
    def close_while_it_writes(self, index: int) -> None:
        self.world.close(self.pick(index, self.busy()))

    @precondition(lambda self: self.idle())
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        if len(self.world.generations) < 4:
            self.world.fork(self.pick(index, self.idle()))

    @precondition(lambda self: self.idle())
    @rule(index=INDEX, length=INDEX)
    def rewind(self, index: int, length: int) -> None:
        generation = self.pick(index, self.idle())
        generation.rewind(length % (len(generation.token_ids) + 1))

    @precondition(lambda self: self.idle())
    @rule(index=INDEX, ids=IDS)
    def write(self, index: int, ids: list[int]) -> None:
        self.pick(index, self.idle()).extend(text=ids)

    @precondition(lambda self: self.idle())
    @rule(index=INDEX)
    def close(self, index: int) -> None:
        self.world.close(self.pick(index, self.idle()))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


def run(examples: int, steps: int, **more: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=checks, **more)
    run_state_machine_as_test(Server, settings=options)  # type: ignore[no-untyped-call]


def test_any_order_of_what_clients_do_leaves_every_invariant_true() -> None:
    run(60, 40)


@pytest.mark.slow
def test_any_order_at_length() -> None:
    """3,000 servers, each under at most 100 rules of at most 5 turns; others in every run."""
    run(3000, 100, derandomize=False)
