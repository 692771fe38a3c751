"""Whole lives of a server, each from a seed; and that the simulation notices what it is there to notice."""

from nudging import Base, SamplingParams
from tests.simulated import Setup
from tests.simulation import World

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def test_a_generation_that_waits_gives_way_to_those_before_it() -> None:
    world = World(Setup(block_size=1, blocks=(30, 30)))
    generation = world.open([2, 3], Base())
    world.extend(generation, GREEDY)
    while world.jobs:
        world.turn()
    assert world.llm._engine.runners["base"].pool.num_free < 20
    # Both come at once: the generation waits with its cache, and the request before it needs nearly all.
    world.submit([4, 5], SamplingParams(max_tokens=24, ignore_eos=True), Base(), "off")
    world.extend(generation, GREEDY)
    world.drain()
    assert len(generation.token_ids) == 24
