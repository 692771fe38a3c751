"""The pass in one call of C++ has the bits of the pass op by op, whatever family, dtype and threads."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nudging import _C
from nudging.kernels.cpu import team, use_team
from nudging.kernels.op import FORCED
from nudging.kernels.weight import look_up
from nudging.models.batch import Batch
from nudging.models.cpu_forward import WholePass
from nudging.models.decoder import Between, Decoder
from nudging.models.kv_cache import KVCache
from nudging.models.loader import load_model
from tests.support.hf_models import CASES, SHAPE, build_hf

pytestmark = pytest.mark.skipif(FORCED == "reference", reason="C++ is switched off")

BLOCK_SIZE = 4
LENGTHS = (15, 9, 14)  # tokens of each sequence after the step
NEW = (5, 1, 14)  # of which these are its rows


def ragged_batch(decoder: Decoder, seed: int) -> Batch:
    """A decode step, a draft to verify and a prompt over scattered blocks; some rows' logits are wanted."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(24, generator=draw)
    tables = torch.full((len(LENGTHS), 6), 2**31 - 1)
    slots, positions, used = [], [], 0
    for s, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        blocks = -(-length // BLOCK_SIZE)
        tables[s, :blocks] = order[used : used + blocks]
        used += blocks
        at = torch.arange(length - new, length)
        positions.append(at)
        slots.append(tables[s, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE)
    return Batch(
        ids=torch.randint(decoder.config.vocab_size, (sum(NEW),), generator=draw),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        cu_seqlens_q=torch.tensor([0, 5, 6, 20], dtype=torch.int32),
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        block_tables=tables.int(),
        logit_rows=torch.tensor([0, 4, 5, 19]),
    )


def filled_cache(decoder: Decoder) -> KVCache:
    """24 blocks of noise: what a step reads is there."""
    config = decoder.config
    kv = KVCache(
        config.num_layers, 24, BLOCK_SIZE, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device
    )
    draw = torch.Generator().manual_seed(7)
    for cache in (kv.k, kv.v):
        cache.copy_(torch.randn(cache.shape, generator=draw))
    return kv


def step(decoder: Decoder, batch: Batch, whole: bool) -> list[Tensor]:
    """Logits, keys and values after one step, as bits."""
    kv = filled_cache(decoder)
    if whole:
        logits = decoder.forward(batch, kv)
    else:
        x = look_up(decoder.weights.embed, batch.ids)
        if decoder.config.embedding_scale != 1.0:
            x = x * torch.tensor(decoder.config.embedding_scale, dtype=x.dtype)
        logits = decoder.op_by_op(Between(x), batch, kv)
    return [t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in (logits, kv.k, kv.v)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    build_hf(CASES[request.param], seed=3).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_whole_pass_has_the_bits_of_the_ops(
    checkpoint: Path, dtype: torch.dtype, quantization: Any
) -> None:
    decoder = load_model(checkpoint, dtype, quantization=quantization)
    assert (decoder.whole_pass is None) == bool(decoder.config.clip_qkv)
    batch = ragged_batch(decoder, seed=1)
    with torch.inference_mode():
        got = step(decoder, batch, whole=True)
        assert got[0].view(torch.float32).isfinite().all()
        assert_same(got, step(decoder, batch, whole=False))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for its ops to be parted among threads."""
    directory = tmp_path_factory.mktemp("wide")
    wide = {**SHAPE, "hidden_size": 192, "intermediate_size": 520, "vocab_size": 4099}
    build_hf(CASES["llama"]._replace(changes=wide), seed=5).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(
    wide: Path, dtype: torch.dtype, quantization: Any
) -> None:
    decoder = load_model(wide, dtype, quantization=quantization)
    batch = ragged_batch(decoder, seed=2)
    with torch.inference_mode():
        want = step(decoder, batch, whole=False)
        for threads in (1, 2, 3, 8):
            with use_team(_C.Team(threads)):
                for _ in range(20):
                    assert_same(step(decoder, batch, whole=True), want)


def test_threads_that_share_a_team_take_turns(wide: Path) -> None:
    decoder = load_model(wide)
    batch = ragged_batch(decoder, seed=2)
    shared, results = _C.Team(3), []

    def work() -> None:
        with torch.inference_mode(), use_team(shared):
            results.extend(step(decoder, batch, whole=True)[0] for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_process_works_without_the_helpers(wide: Path) -> None:
    decoder = load_model(wide)
    batch = ragged_batch(decoder, seed=2)
    with torch.inference_mode(), use_team(_C.Team(3)):
        want = step(decoder, batch, whole=True)
        child = os.fork()
        if child == 0:
            same = all(map(torch.equal, step(decoder, batch, whole=True), want))
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_team_belongs_to_its_block_and_its_thread() -> None:
    mine, seen = _C.Team(2), []
    with use_team(mine):
        assert team() is mine
        other = threading.Thread(target=lambda: seen.append(team()))
        other.start()
        other.join()
    assert seen[0] is not mine
    assert team() is not mine
    assert team().threads == torch.get_num_threads()
    for wrong in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads is {wrong}, it must be from 1 to 1024"):
            _C.Team(wrong)


WRONG = {
    "positions": (5, 128, "position 128, the table ends before 128"),
    "slot_mapping": (3, 100, "goes to slot 100, the cache has 100 slots"),
    "logit_rows": (1, 20, "logit row 20 is wanted, there are 20 rows"),
    "seq_lens": (0, 25, "sequence 0 has length 25, its block table holds 6 blocks of 4"),
}


@pytest.fixture
def small(tmp_path: Path) -> Decoder:
    build_hf(CASES["llama"], seed=99).save_pretrained(tmp_path)
    return load_model(tmp_path)


@pytest.mark.parametrize("field", list(WRONG))
def test_a_batch_that_does_not_fit_is_refused_and_writes_nothing(small: Decoder, field: str) -> None:
    index, value, message = WRONG[field]
    batch, kv = ragged_batch(small, seed=4), filled_cache(small)
    before = kv.k.clone(), kv.v.clone()
    getattr(batch, field)[index] = value
    with pytest.raises(ValueError, match=message):
        small.forward(batch, kv)
    assert torch.equal(kv.k, before[0])
    assert torch.equal(kv.v, before[1])


def test_tensors_of_another_dtype_shape_or_layout_are_refused(small: Decoder) -> None:
    batch, kv = ragged_batch(small, seed=4), filled_cache(small)
    assert isinstance(small.whole_pass, WholePass)
    x = look_up(small.weights.embed, batch.ids)
    for wrong in (x.double(), x[:-1], x.T.contiguous().T):
        with pytest.raises(ValueError, match="decode: x is"):
            small.whole_pass(wrong, batch, kv)
