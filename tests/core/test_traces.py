"""Rejected drafts leave no trace: the cache of the committed text is that of a text nobody drafted."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nudging import Nudging, SamplingParams
from nudging.api.loading import load_roles, make_runners
from nudging.core.engine import Engine
from nudging.core.request import Request
from nudging.core.sequence import Sequence
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from tests.core.test_exactness import prompt_of
from tests.support.pairs import Twin
from tests.support.tiny import write_tiny_checkpoint

BLOCK_SIZE = 4
PAIRS = ("llama-qwen3", "gemma2-qwen2", "pocket")


class Pair(NamedTuple):
    """An opened pair, its straight-line twin, and what a fresh prefill of each text leaves in a cache."""

    roles: dict[str, Role]
    decoders: dict[str, Decoder]
    twin: Twin
    fresh: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=PAIRS)
def pair(
    request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    checkpoints: dict[str, str | Path] = {"base": "pocket:base", "guide": "pocket:guide"}
    if request.param != "pocket":
        root, eos = tmp_path_factory.mktemp("pair"), tuple(range(40, 46))
        for name, family, hidden in zip(checkpoints, request.param.split("-"), (48, 32), strict=True):
            checkpoints[name] = write_tiny_checkpoint(root / name, family, 3, hidden_size=hidden, eos=eos)
    roles, decoders = load_roles(checkpoints, dtype, torch.device("cpu"), progress=False, max_len=None)
    runners = make_runners(decoders, roles, 1 << 20, BLOCK_SIZE, prefix_caching=False, threads=1)
    llm = SimpleNamespace(_engine=SimpleNamespace(runners=runners), roles=roles)
    return Pair(roles, decoders, Twin(llm), {})


def open_engine(pair: Pair, max_batch_tokens: int) -> Engine:
    runners = make_runners(pair.decoders, pair.roles, 8 << 20, BLOCK_SIZE, prefix_caching=True, threads=1)
    for runner in runners.values():
        runner.poison()
    return Engine(runners, {role: role for role in pair.roles}, max_batch_tokens)


@pytest.fixture(params=[1, 3, 8, "changing"])
def k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens a draft; where that changes, as with adaptive drafts, roles lag behind texts they misjudged."""
    if request.param == "changing":
        lengths = itertools.cycle((8, 0, 0, 3, 0, 1))
        monkeypatch.setattr("nudging.core.speculation.drafting._length", lambda *_: next(lengths))
        return 8
    return request.param


def make_requests(pair: Pair, k: int) -> list[Request]:
    """Greedy and sampled, by token and by word, each role under a prompt of its own."""
    return [
        Request(
            f"{seed}",
            Nudging(0.4, granularity),
            SamplingParams(max_tokens=18, temperature=temperature, seed=seed, ignore_eos=seed % 2 == 0),
            seed,
            {name: RolePrompt(prompt_of(seed + 100 * i)) for i, name in enumerate(pair.roles)},
            pair.roles,
            k,
            drafter=drafter,
        )
        for seed, (granularity, temperature, drafter) in enumerate(
            [("token", 0.0, "guide"), ("word", 0.0, "guide"), ("token", 0.8, "guide"), ("word", 0.8, "guide"),
             ("token", 0.0, "ngram")]
        )
    ]  # fmt: skip


def agreed(request: Request, role: str, sequence: Sequence) -> tuple[list[int], int]:
    """Prompt and text, and up to where what the role has computed is that."""
    text = request.prompts[role].ids + request.output
    computed = sequence.tokens[: sequence.num_computed]
    pairs = enumerate(zip(computed, text, strict=False))
    return text, next((i for i, (a, b) in pairs if a != b), min(len(computed), len(text)))


def slots(sequence: Sequence, first: int, last: int) -> list[int]:
    return [sequence.block_table.slot(at) for at in range(first, last)]


def prefill(pair: Pair, role: str, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The keys and values [layers, len(ids), heads, head_dim] that one pass over `ids` leaves behind."""
    key = (role, tuple(ids))
    if key not in pair.fresh:
        decoder, n = pair.decoders[role], len(ids)
        config = decoder.config
        size = (config.num_layers, 1, n, config.num_kv_heads, config.head_dim)
        kv, at = KVCache(*size, decoder.dtype, decoder.device), torch.arange(n)
        ends = torch.tensor([0, n], dtype=torch.int32)
        table = torch.zeros((1, 1), dtype=torch.int32)
        decoder.forward(Batch(torch.tensor(ids), at, at, ends, ends[1:], table, at[:0]), kv)
        pair.fresh[key] = kv.k.flatten(1, 2), kv.v.flatten(1, 2)
    return pair.fresh[key]


def run(engine: Engine, requests: list[Request]) -> Iterator[list[tuple[Request, str, Sequence]]]:
    """Every running sequence, after every step."""
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        yield [(r, role, s) for r in engine.scheduler.running for role, s in r.sequences.items()]


def assert_some_drafts_were_wrong(requests: list[Request]) -> None:
    assert all(request.error is None for request in requests)
    counters = [request.counters for request in requests]
    assert 0 < sum(c.accepted for c in counters) < sum(c.drafted for c in counters)


@pytest.mark.parametrize("max_batch_tokens", [7, 2048])
def test_the_cache_of_the_text_is_that_of_a_fresh_prefill_after_every_cycle(
    pair: Pair, k: int, max_batch_tokens: int
) -> None:
    engine = open_engine(pair, max_batch_tokens)
    requests = make_requests(pair, k)
    for running in run(engine, requests):
        for request, role, sequence in running:
            text, end = agreed(request, role, sequence)
            cache = engine.runners[role].cache
            for held, fresh in zip((cache.k, cache.v), prefill(pair, role, text), strict=True):
                mine = held.flatten(1, 2)[:, slots(sequence, 0, end)]
                assert torch.equal(mine.view(torch.uint8), fresh[:, :end].contiguous().view(torch.uint8))
    assert_some_drafts_were_wrong(requests)


def test_what_was_rejected_may_be_anything(pair: Pair, k: int) -> None:
    """Every slot of a rejected token is NaN after its cycle, and so is every slot given back."""
    engine = open_engine(pair, 7)
    requests = make_requests(pair, k)
    poisoned, before = 0, dict[str, set[int]]()
    for running in run(engine, requests):
        for role, runner in engine.runners.items():
            held = [(request, sequence) for request, name, sequence in running if name == role]
            spoilt = []
            for request, sequence in held:
                text, end = agreed(request, role, sequence)
                first = end if end < len(text) else max(end, sequence.num_computed)
                spoilt += slots(sequence, first, len(sequence.block_table.ids) * BLOCK_SIZE)
            owned = {block for _, sequence in held for block in sequence.block_table.ids}
            given_back = before.get(role, set()) - owned
            spoilt += [block * BLOCK_SIZE + i for block in given_back for i in range(BLOCK_SIZE)]
            before[role] = owned
            for side in (runner.cache.k, runner.cache.v):
                side.flatten(1, 2)[:, spoilt] = float("nan")
            poisoned += len(spoilt)
    assert poisoned > 100
    assert_some_drafts_were_wrong(requests)
    for request in requests:
        prompts = {name: prompt.ids for name, prompt in request.prompts.items()}
        want = pair.twin.generate(prompts, request.params, request.policy)
        assert (request.output, request.finish_reason) == (want.token_ids, want.finish_reason)
        assert [piece.author for piece in request.pieces] == want.authors
