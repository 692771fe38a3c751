"""Open texts over simulated models: seeds, positions, scores, and what they hold of the engine."""

from itertools import accumulate

import pytest

from nudging import BadRequest, Base, EngineClosed, Guide, Nudging, SamplingParams
from nudging.api.generation import Generation
from tests.support.simulated import TOKENIZER, VOCAB, Setup, SimLLM
from tests.support.simulation import World

WARM = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=6, temperature=1.0, seed=5, ignore_eos=True)


@pytest.fixture
def llm():  # type: ignore[no-untyped-def]
    with SimLLM(Setup(), threaded=True) as llm:
        yield llm


def extended(text: Generation, *params: SamplingParams) -> list[int]:
    return [token for p in params for token in text.extend(p).token_ids]


def test_an_open_text_goes_on_as_one_that_was_never_cut(llm: SimLLM) -> None:
    policy = Nudging(0.4, "token")
    whole = llm.generate(
        [[2, 3]], SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True), policy
    )
    with llm.open([2, 3], policy) as text:
        assert tuple(extended(text, SEEDED, SEEDED)) == whole[0].outputs[0].token_ids
        assert (tuple(text.token_ids), tuple(text.authors)) == (
            whole[0].outputs[0].token_ids,
            whole[0].outputs[0].authors,
        )
        assert text.text == TOKENIZER.text_of(text.token_ids) == whole[0].outputs[0].text
        text.rewind(7)
        assert tuple(text.token_ids) == whole[0].outputs[0].token_ids[:7]
        assert tuple(text.authors) == whole[0].outputs[0].authors[:7]
        text.rewind(0)
        assert (text.token_ids, text.authors, text.text) == ([], [], "")


def test_without_a_seed_a_text_has_its_own_which_its_forks_share(llm: SimLLM) -> None:
    with llm.open([2, 3], Base()) as text, text.fork() as fork, llm.open([2, 3], Base()) as other:
        first = extended(text, WARM, WARM)
        assert extended(fork, WARM, WARM) == first
        assert fork.authors == text.authors
        assert extended(other, WARM, WARM) != first
        with text.fork() as later:
            assert (later.token_ids, later.authors) == (text.token_ids, text.authors)
            later.extend(text=[7])
            assert len(text.token_ids) == len(text.authors) == 12, "a fork is independent"


def test_an_open_text_ends_at_the_policys_defaults(llm: SimLLM) -> None:
    with llm.open([2, 3], Base()) as text:
        assert text.extend(SamplingParams(ignore_eos=True)).finish_reason == "length"
        assert len(text.token_ids) == SamplingParams().max_tokens
    with llm.open([2, 3], Base()) as text:
        assert len(text.extend().token_ids) <= SamplingParams().max_tokens


def test_a_given_text_is_written_as_it_stands(llm: SimLLM) -> None:
    with llm.open([2, 3], Base()) as text:
        output = text.extend(text=" a12")
        assert (output.text, output.authors) == (" a12", ("caller",) * len(output.token_ids))
        assert text.token_ids == TOKENIZER.encode_continuation(" a12")
        text.extend(text=[0, VOCAB - 1])
        assert text.token_ids[-2:] == [0, VOCAB - 1]
        assert text.authors == ["caller"] * len(text.token_ids)


@pytest.mark.parametrize("policy", [Base(), Guide(), Nudging(0.4, "token"), Nudging(0.4, "word")], ids=repr)
def test_a_policys_own_text_scores_its_own_logprobs(llm: SimLLM, policy: Base) -> None:
    params = SamplingParams(max_tokens=12, logprobs=0, ignore_eos=True)
    output = llm.generate([[2, 3]], params, policy)[0].outputs[0]
    own = [entry.logprob for entry in output.logprobs or () if entry is not None]
    with llm.open([2, 3], policy) as text:
        assert text.score(list(output.token_ids)) == own
        assert text.token_ids == []
        text.extend(text=list(output.token_ids[:1]))
        if policy != Nudging(0.4, "word"):
            assert text.score(list(output.token_ids[1:])) == own[1:]
        assert text.score([output.token_ids[1]])[0] == own[1]


def test_a_full_context_says_how_to_go_on() -> None:
    with SimLLM(Setup(max_len=12), threaded=True) as llm, llm.open([2, 3], Base()) as text:
        assert text.extend(SamplingParams(max_tokens=40, ignore_eos=True)).finish_reason == "length"
        assert len(text.token_ids) == 10
        full = r"prompt and text have 12 tokens and the context of 'base' is 12; rewind\(\)"
        with pytest.raises(BadRequest, match=full):
            text.extend()
        text.rewind(9)
        assert len(text.extend(SamplingParams(ignore_eos=True)).token_ids) == 1


def test_an_open_text_keeps_its_cache_and_gives_it_back(llm: SimLLM) -> None:
    pools = [runner.pool for runner in llm.runners]
    held = [pool.total - pool.num_available for pool in pools]
    assert held == [0, 0]
    with llm.open([2] * 20, Nudging(0.4, "token")) as text:
        greedy = SamplingParams(max_tokens=6, ignore_eos=True)
        first = text.extend(greedy).stats
        assert [pool.total - pool.num_available > 4 for pool in pools] == [True, True]
        with text.fork() as fork:
            before = [runner.passes for runner in llm.runners]
            assert fork.extend(greedy).stats.cached_tokens == 0
            made = [runner.passes - n for runner, n in zip(llm.runners, before, strict=True)]
            assert max(made) <= 8, "what its source computed it has, too"
        assert (first.base_passes <= 8, first.drafted) == (True, 0)
    assert [pool.total - pool.num_available for pool in pools] == held


def test_closing_a_text_after_its_engine_is_no_error() -> None:
    llm = SimLLM(Setup(), threaded=True)
    text = llm.open([2, 3], Base())
    text.extend(SamplingParams(max_tokens=2, ignore_eos=True))
    llm.close()
    with pytest.raises(EngineClosed):
        text.extend()
    text.close()
    assert text._caches.sequences == {}


def test_every_extension_is_a_request_of_its_own(llm: SimLLM) -> None:
    seen: list[str] = []
    llm.on_end(lambda request: seen.append(request.id))
    with llm.open([2, 3], Base()) as text, llm.open([2, 3], Base()) as other:
        for one in (text, other, text):
            one.extend(SamplingParams(max_tokens=1))
    assert len(set(seen)) == 3
    assert list(accumulate(name.startswith("generation-") for name in seen)) == [1, 2, 3]


def test_an_idle_fork_gives_its_cache_to_who_needs_it() -> None:
    world = World(Setup(block_size=1, blocks=(30, 30)))
    text = world.open([2, 3], Base())
    world.extend(text, SamplingParams(max_tokens=12, ignore_eos=True))
    while world.jobs:
        world.turn()
    fork = world.fork(text)
    job = world.submit([4, 5], SamplingParams(max_tokens=24, ignore_eos=True), Base(), "off")
    for _ in range(30):
        world.turn()
    assert job.handle.is_finished
    world.extend(fork, SamplingParams(max_tokens=3, ignore_eos=True))
    world.drain()
