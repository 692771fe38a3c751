"""What was computed once is found again: the same text for less work, and never between salts."""

from pathlib import Path

import pytest

from nudging import LLM, Base, Nudging, SamplingParams
from nudging.core.block_pool import BlockPool
from nudging.core.engine import Engine
from nudging.core.prefix_cache import PrefixCache
from nudging.core.request import Request
from nudging.core.sequence import Sequence as Memo
from tests.core.test_scheduler import assert_all_free, finish, request, small_engine
from tests.support.pairs import Twin, assert_pools_are_whole, one, written

PROMPT_IDS = list(range(2, 32)) * 2  # 60 tokens, 15 blocks of 4


class Rows:
    """Counts the tokens that an engine's models compute."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of = dict.fromkeys(engine.runners, 0)
        for name, runner in engine.runners.items():
            execute = runner.execute

            def counted(works, wanted, fast_path=None, name=name, execute=execute):
                carried = 0 if fast_path is None else fast_path.num_tokens
                self.of[name] += carried + sum(work.end - work.start for work in works)
                return execute(works, wanted, fast_path)

            monkeypatch.setattr(runner, "execute", counted)


def run_one(engine: Engine, job: Request) -> Request:
    engine.add(job)
    finish(engine)
    return job


def test_a_hit_is_the_same_tokens_behind_the_same_ones_even_where_all_hashes_collide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PrefixCache, "_hash", lambda self, data: b"same")
    cache = PrefixCache()
    a, b = cache.empty(None), cache.empty("b")
    first, _ = cache.add(a, [1, 2], 0)
    assert cache.find(a, [1, 2]) is first
    assert cache.find(a, [1, 3]) is None
    assert cache.find(b, [1, 2]) is None
    assert cache.find(first, [1, 2]) is None
    other, stale = cache.add(a, [3, 4], 1)
    assert (stale, cache.find(a, [1, 2]), cache.find(a, [3, 4])) == (0, None, other), "one key, one block"


def test_keys_are_secret_to_each_cache() -> None:
    keys = [PrefixCache().empty(None).key for _ in range(2)]
    assert keys[0] != keys[1]


def test_a_prefix_computed_anew_does_not_get_the_children_of_the_old_one() -> None:
    cache = PrefixCache()
    parent, _ = cache.add(cache.empty(None), [1, 2], 0)
    cache.add(parent, [3, 4], 1)
    cache.forget(0)
    again, _ = cache.add(cache.empty(None), [1, 2], 2)
    assert cache.find(again, [3, 4]) is None
    child, stale = cache.add(again, [3, 4], 3)
    assert (child.block, stale) == (3, 1)


def test_a_block_that_lost_its_key_stays_with_who_holds_it() -> None:
    """Another block has its tokens now, behind a beginning that was computed anew."""
    pool = BlockPool(4, 2)
    blocks = [pool.allocate() for _ in range(4)]
    for held in (True, False):
        parent = pool.register(pool.prefixes.empty(None), [1, 2], blocks[0])
        pool.register(parent, [3, 4], blocks[1])
        pool.forget(blocks[0])
        if not held:
            pool.release(blocks[1])
        again = pool.register(pool.prefixes.empty(None), [1, 2], blocks[2])
        assert pool.register(again, [3, 4], blocks[3]).block == blocks[3]
        pool.check()
        assert (pool.num_free, pool.num_cached) == (0, 0) if held else (1, 0)
        for block in blocks[2:]:
            pool.forget(block)


def test_the_longest_unused_block_goes_first_and_a_texts_end_before_its_beginning() -> None:
    pool = BlockPool(6, 2)
    texts = {name: Memo(pool, ids) for name, ids in (("old", [1] * 6), ("new", [2] * 6))}
    for text in texts.values():
        text.prepare_write(0, 6)
        text.computed(6)
        text.register()
    for text in texts.values():
        text.release()
    assert (pool.num_free, pool.num_cached) == (0, 6)
    other = Memo(pool, [3] * 8)
    for used, (old, new) in enumerate([(4, 6), (2, 6), (0, 6), (0, 4)], 1):
        other.prepare_write(2 * used - 2, 2 * used)
        known = []
        for tokens in ([1] * 6, [2] * 6):
            parent, length = pool.prefixes.empty(None), 0
            while length < 6 and (parent := pool.prefixes.find(parent, tokens[:2])) is not None:
                length += 2
            known.append(length)
        assert known == [old, new]
        pool.check()


@pytest.mark.parametrize("chunk", [7, 2048])
def test_a_second_request_computes_only_what_is_new(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    engine, roles = small_engine(200, max_batch_tokens=chunk)
    first = run_one(engine, request(roles, "x", PROMPT_IDS, 10, Nudging(0.4, "token")))
    rows = Rows(engine, monkeypatch)
    again = run_one(engine, request(roles, "x", PROMPT_IDS, 10, Nudging(0.4, "token")))
    assert again.output == first.output
    assert again.counters.cached == 56 + 60, "one token is left to compute, for the guide one of the text"
    assert rows.of["base"] == 4 + 9
    longer = run_one(engine, request(roles, "y", PROMPT_IDS + first.output + [7, 8], 5))
    assert longer.counters.cached == 68, "a text that was written is found, too"
    assert_all_free(engine)


def test_salts_do_not_share() -> None:
    engine, roles = small_engine(200)
    cached = [
        run_one(engine, request(roles, "x", PROMPT_IDS, 3, cache_salt=salt)).counters.cached
        for salt in (None, "a", "", None, "a", "b", "")
    ]
    assert cached == [0, 0, 0, 56, 56, 0, 56]


def test_it_can_be_switched_off(tiny_pair: dict[str, Path]) -> None:
    for prefix_caching, expected in ((True, 32), (False, 0)):
        with LLM(**tiny_pair, kv_cache_memory="2MiB", prefix_caching=prefix_caching) as llm:
            for _ in range(2):
                output = one(llm, [60] * 40, Base(), max_tokens=4, ignore_eos=True)
            assert output.stats.cached_tokens == expected
            pool = llm._engine.runners["base"].pool
            assert (pool.num_cached > 0) == prefix_caching
            assert_pools_are_whole(llm)


def siblings(roles, count: int, max_tokens: int, policy=None) -> list[Request]:
    jobs = []
    for i in range(count):
        jobs.append(request(roles, f"s{i}", PROMPT_IDS[:58], max_tokens, policy))
        jobs[-1].seed = i
    for job in jobs:
        job.siblings = tuple(jobs)
    return jobs


@pytest.mark.parametrize("max_tokens", [1, 12])
@pytest.mark.parametrize("chunk", [7, 2048])
def test_n_texts_read_their_prompt_once_for_each_role(
    monkeypatch: pytest.MonkeyPatch, chunk: int, max_tokens: int
) -> None:
    """Also without a prefix cache, where the prompt ends inside a block, and where the first text is over at
    once.
    """
    engine, roles = small_engine(200, max_batch_tokens=chunk, prefix_caching=False)
    rows = Rows(engine, monkeypatch)
    jobs = siblings(roles, 5, max_tokens)
    for job in jobs:
        engine.add(job)
    finish(engine)
    assert rows.of["base"] == 58 + 4 + 5 * (max_tokens - 1), (
        "the first reads the prompt, the others one token"
    )
    assert [job.counters.cached for job in jobs] == [0] + [57] * 4
    for i, job in enumerate(jobs):
        other, other_roles = small_engine(200)
        assert job.output == run_one(other, siblings(other_roles, 5, max_tokens)[i]).output
    assert_all_free(engine)


def test_siblings_share_memory_and_need_not_fit_side_by_side_with_whole_prompts() -> None:
    engine, roles = small_engine(50)
    jobs = siblings(roles, 8, 8)
    for job in jobs:
        engine.add(job)
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) == 8, "8 prompts of 15 blocks do not fit into 50"
    finish(engine)
    assert sum(job.counters.preemptions for job in jobs) == 0
    assert_all_free(engine)


def test_a_common_beginning_is_held_once_by_requests_that_come_later() -> None:
    engine, roles = small_engine(50)
    engine.add(request(roles, "first", [*PROMPT_IDS, 5], 20))
    engine.step()
    others = [request(roles, f"r{i}", [*PROMPT_IDS, i + 2], 20) for i in range(4)]
    for job in others:
        engine.add(job)
    engine.step()
    assert len(engine.scheduler.running) == 5
    finish(engine)
    assert [job.counters.cached for job in others] == [60] * 4


def test_an_aborted_leader_hands_its_prompt_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, roles = small_engine(200, max_batch_tokens=20)
    rows = Rows(engine, monkeypatch)
    jobs = siblings(roles, 3, 4)
    for job in jobs:
        engine.add(job)
    engine.step()
    engine.step()
    engine.abort(jobs[0])
    finish(engine)
    assert rows.of["base"] == 58 + 1 + 2 * 3
    assert [len(job.output) for job in jobs] == [0, 4, 4]


def test_siblings_go_on_in_the_step_after_their_prompt_was_read() -> None:
    engine, roles = small_engine(200)
    jobs = siblings(roles, 3, 4)
    for job in jobs:
        engine.add(job)
    engine.step()
    assert engine.scheduler.claims.of(jobs[1]) == {"base": 16 - 14, "guide": 0}, "they share its whole blocks"
    assert [len(job.output) for job in jobs] == [1, 0, 0]
    engine.step()
    assert [len(job.output) for job in jobs] == [2, 1, 1]


def test_what_was_found_for_one_that_is_gone_is_forgotten_and_no_other() -> None:
    engine, roles = small_engine(200, max_batch_tokens=20)
    jobs = siblings(roles, 3, 4)
    for job in jobs:
        engine.add(job)
    engine.step()
    engine.abort(jobs[0])
    assert [found.request for found in engine.scheduler._found] == jobs[1:]
    engine.abort(jobs[1])
    assert [found.request for found in engine.scheduler._found] == jobs[2:]
    finish(engine)
    assert len(jobs[2].output) == 4


def test_a_plan_says_what_need_not_be_computed() -> None:
    engine, roles = small_engine(200)
    found = []
    for _ in range(2):
        job = request(roles, "x", PROMPT_IDS, 1)
        engine.add(job)
        plans = []
        schedule = engine.scheduler.schedule
        engine.scheduler.schedule = lambda model: plans.append(schedule(model)) or plans[-1]  # noqa: B023
        finish(engine)
        engine.scheduler.schedule = schedule
        found.append([(f.request, f.role, f.start, f.end) for plan in plans for f in plan.found])
    assert found == [[], [(job, "base", 0, 56)]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hits_forks_chunks_and_preemption_change_no_token(tiny_pair: dict[str, Path], dtype: str) -> None:
    """Conversations that grow: each turn begins with all turns before."""
    turns = [[60 + (7 * i + j) % 250 for j in range(9 + i)] for i in range(4)]
    prompts = [[*sum(turns[: i + 1], []), 52 + k] for i in range(4) for k in range(3)]
    policies = [(Base(), Nudging(0.4, "token"), Nudging(0.4, "word"))[i % 3] for i in range(12)]
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, n=2, ignore_eos=True)
    with LLM(**tiny_pair, dtype=dtype, kv_cache_memory="8MiB", prefix_caching=False) as llm:
        alone = [llm.generate(p, params, q)[0].outputs for p, q in zip(prompts, policies, strict=True)]
    # 48 blocks of 4 tokens for 24 texts, and one that pads batches.
    memory = 49 * 4 * (4 if dtype == "float32" else 2) * (2 * 2 * 2 * 12 + 2 * 2 * 2 * 16)
    options = {"dtype": dtype, "max_batch_tokens": 24, "block_size": 4, "kv_cache_memory": memory}
    with LLM(**tiny_pair, **options) as llm:
        assert {r.pool.total for r in llm._engine.runners.values()} == {48}
        for _ in range(2):
            results = llm.generate(prompts, params, policies)
            for result, expected in zip(results, alone, strict=True):
                assert [written(o) for o in result.outputs] == [written(o) for o in expected]
        totals = llm.stats().totals
        assert totals.cached_tokens > 0 < totals.preemptions
        assert_pools_are_whole(llm)


def test_rewinding_a_text_leaves_no_wrong_block_behind(tiny_pair: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with LLM(**tiny_pair, kv_cache_memory="2MiB", block_size=4) as llm:
        twin = Twin(llm)
        prompt = list(range(60, 80))
        with llm.open(prompt, Nudging(0.4, "token")) as generation:
            first = generation.extend(params).token_ids
            generation.rewind(9)
            generation.extend(text=[90, 91, 92, 93, 94])
            generation.extend(params)
            generation.rewind(3)
            assert generation.extend(params).token_ids[:27] == first[3:]
        for text in (prompt + list(first[:25]), [*prompt, *first[:9], 90, 91, 92, 93, 94, 95]):
            output = one(llm, text, Nudging(0.4, "token"), max_tokens=10)
            assert written(output) == twin.generate(
                text, SamplingParams(max_tokens=10), Nudging(0.4, "token")
            )
            assert output.stats.cached_tokens > 0
        assert_pools_are_whole(llm)


def test_a_salt_holds_for_open_texts(tiny_pair: dict[str, Path]) -> None:
    with LLM(**tiny_pair, kv_cache_memory="2MiB") as llm:
        for salt, cached in (("a", 0), ("a", 32), ("b", 0), (None, 0)):
            with llm.open([60] * 40, Base(), cache_salt=salt) as generation:
                assert generation.extend(SamplingParams(max_tokens=2)).stats.cached_tokens == cached


def test_salts_that_nobody_uses_are_not_kept() -> None:
    cache = BlockPool(2, 2).prefixes
    parents = [cache.empty(str(i)) for i in range(100)]
    assert len(cache._empty) == 100
    del parents
    assert len(cache._empty) == 0
