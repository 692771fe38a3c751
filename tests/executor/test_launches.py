"""How many kernels a layer is on a GPU, for each family, and that together they are the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from nudging.cli.info import gpu_tiles
from nudging.executor.batch import BatchBuffer, BatchShape
from nudging.executor.cuda_graphs import PickBuffer, RecordedPass, RecordedPath
from nudging.executor.cycles.recorded_cycle import CycleShape, Model, RecordedCycle, cycle_memory
from nudging.kernels.rms_norm import rms_norm
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache
from nudging.models.loader import load_model
from tests.support.compare import assert_same_bits
from tests.support.interpreter import DEVICE
from tests.support.launches import Launches, triton_runs_all_ops
from tests.support.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted where the kernels are interpreted")

FIVE = {"_linear_rope_append": 1, "_attend_split": 1, "_linear_add": 2, "_gated_linear": 1}
# What a block gives back is normalised before it is added: only who has the whole row can do that.
POST_NORM = {"_attend_split": 1, "_linear": 2, "_add_rms_norm": 2, "_gated_linear": 1}
LAYER = {
    "llama": FIVE,
    "mistral": FIVE,
    "qwen2": FIVE,
    "phi3": FIVE,
    "qwen3": FIVE,
    # A variance is of what is left of the mean, which is known when the row is complete.
    "olmo": {**FIVE, "_layer_norm": 2},
    "gemma2": {**POST_NORM, "_linear_rope_append": 1},
    "gemma3_text": {**POST_NORM, "_linear_rope_append": 1},
    # All heads at once are normalised between product and rotation, and nobody has them all.
    "olmo2": {**POST_NORM, "_linear": 3, "_rope_append": 1},
}
COUNTS = {"llama": 5, "mistral": 5, "qwen2": 5, "phi3": 5, "qwen3": 5, "olmo": 7}
COUNTS |= {"gemma2": 7, "gemma3_text": 7, "olmo2": 8}


# The interpreter takes milliseconds for every program.
SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def one_batch(rows: int) -> Batch:
    """The first tokens of one text, with a block table that has room for two splits of keys."""
    at = torch.arange(rows)
    cu, tables = torch.tensor([0, rows]).int(), torch.arange(32).int()[None]
    return Batch(at + 60, at, at, cu, torch.tensor([rows]).int(), tables, at)


def hidden(decoder: Decoder, rows: int) -> Tensor:
    x, norm = decoder.before_head(one_batch(rows), cache_of(decoder))
    return x if norm is None else rms_norm(x, norm.weight, norm.eps, norm.unit_offset)


class Counting:
    """A recorder that runs what is recorded and lists what it launched."""

    def __init__(self) -> None:
        self.found = Launches()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with self.found.listening():
            run()
        return run

    def mark(self) -> Callable[[], None]:
        raise AssertionError("nobody waits here")


def shortened(decoder: Decoder, layers: int) -> Decoder:
    weights = decoder.weights._replace(layers=decoder.weights.layers[:layers])
    return Decoder(replace(decoder.config, num_layers=layers), weights)


@pytest.mark.parametrize("family", LAYER)
def test_a_layer_is_so_many_launches_and_they_compute_what_the_cpu_does(family: str, tmp_path: Path) -> None:
    decoder = load_model(write_tiny_checkpoint(tmp_path, family, **SMALL), packed=False)
    launched = []
    with triton_runs_all_ops():
        for layers in (1, 2):
            found = Launches()
            with found.listening():
                got = hidden(shortened(decoder, layers), rows=2)
            launched.append(Counter(found.names))
    assert launched[1] - launched[0] == Counter(LAYER[family])
    assert (launched[1] - launched[0]).total() == COUNTS[family]
    torch.testing.assert_close(got, hidden(decoder, rows=2), rtol=1e-4, atol=1e-4)


def test_norms_are_launches_of_their_own_where_the_table_says_so(tmp_path: Path) -> None:
    from nudging.kernels.gpu.common import configs

    decoder = load_model(write_tiny_checkpoint(tmp_path, "llama", **SMALL), torch.bfloat16, packed=False)
    apart, found = replace(configs.DEFAULT, fused_norms=False), Launches()
    with triton_runs_all_ops():
        decoder = shortened(decoder, 1)
        fused = hidden(decoder, rows=2)
        with mock.patch.object(configs, "DEFAULT", apart), found.listening():
            assert_same_bits([hidden(decoder, rows=2)], [fused])
    assert found.names.count("_rms_norm") == 3


def test_a_gpu_without_a_table_works_by_the_default_one() -> None:
    from nudging.kernels.gpu.common.configs import DEFAULT, TABLE, config_of

    device, capability = torch.device("cuda"), "torch.cuda.get_device_capability"
    with mock.patch.dict(TABLE, {(9, 0): replace(DEFAULT, pdl=True)}):
        with mock.patch(capability, return_value=(9, 0)):
            assert config_of(device).pdl
            assert gpu_tiles(0) == "those of compute capability 9.0"
        with mock.patch(capability, return_value=(12, 1)):
            assert config_of(device) is DEFAULT
            assert gpu_tiles(0) == "the default ones; the table has 8.0, 9.0, 10.0"


@pytest.mark.parametrize(("family", "quantization"), [("llama", None), ("qwen3", "int8")])
def test_a_row_has_the_same_bits_where_norms_are_within_products_and_where_they_are_not(
    family: str, quantization: str | None, tmp_path: Path
) -> None:
    """From 17 rows on they are launches of their own."""
    decoder = load_model(
        write_tiny_checkpoint(tmp_path, family, **SMALL),
        torch.bfloat16,
        quantization=quantization,
        packed=False,
    )  # type: ignore[arg-type]
    with triton_runs_all_ops():
        decoder, found = shortened(decoder, 2), Launches()  # made here: it runs op by op
        with found.listening():
            many = hidden(decoder, rows=17)
        assert found.names.count("_rms_norm") == 2 * 2 + 1
        for rows in (1, 16):
            assert_same_bits([hidden(decoder, rows)], [many], slice(rows))


def cache_of(decoder: Decoder) -> KVCache:
    config = decoder.config
    return KVCache(
        config.num_layers, 32, 16, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device
    )


def buffer_of(rows: int, cache: KVCache) -> tuple[BatchBuffer, PickBuffer]:
    """The buffer of `one_batch`."""
    batch = one_batch(rows)
    buffer = BatchBuffer(BatchShape(rows, 1, 32, rows), cache.k.device, cache.spare_slot)
    for field in (
        "ids",
        "positions",
        "slot_mapping",
        "cu_seqlens_q",
        "seq_lens",
        "block_tables",
        "logit_rows",
    ):
        getattr(buffer.batch, field).copy_(getattr(batch, field))
    return buffer, PickBuffer(rows, cache.k.device)


def launches(family: str, tmp_path: Path, record: Callable[[Decoder, Counting], object]) -> Counter[str]:
    """What `record` launches of a model of one layer."""
    decoder = load_model(write_tiny_checkpoint(tmp_path, family, **SMALL), packed=False)
    counting = Counting()
    with torch.inference_mode(), triton_runs_all_ops():
        record(shortened(decoder, 1), counting)
    return Counter(counting.found.names)


def of_passes(passes: int, family: str, **more: int) -> Counter[str]:
    """So many passes of one layer, with what is launched besides them."""
    names = {**LAYER[family], **BESIDES.get(family, {}), "_embed": 1, "_lm_head": 1, "_merge_head": 1}
    return Counter({name: passes * count for name, count in names.items()} | more) - Counter()


# A layer norm is a launch of its own before the head, too.
BESIDES = {"olmo": {"_layer_norm": 3}}


@pytest.mark.parametrize("family", LAYER)
def test_a_recorded_pass_is_its_layers_and_three_launches(family: str, tmp_path: Path) -> None:
    def record(decoder: Decoder, counting: Counting) -> None:
        cache = cache_of(decoder)
        RecordedPass(decoder, cache, *buffer_of(2, cache), 90, counting)

    assert launches(family, tmp_path, record) == of_passes(1, family)


def test_a_recorded_path_is_its_passes(tmp_path: Path) -> None:
    def record(decoder: Decoder, counting: Counting) -> None:
        cache = cache_of(decoder)
        buffers, picks = zip(*(buffer_of(1, cache) for _ in range(3)), strict=True)
        RecordedPath(decoder, cache, buffers, picks, torch.tensor([60]).int(), 90, counting)

    assert launches("llama", tmp_path, record) == of_passes(3, "llama")


def test_a_recorded_cycle_is_its_passes_and_three_launches(tmp_path: Path) -> None:
    def record(decoder: Decoder, counting: Counting) -> None:
        guide, base = (Model(decoder, cache_of(decoder)) for _ in range(2))
        marks = torch.zeros(90, dtype=torch.uint8)
        memory = cycle_memory(2, guide.decoder.device)
        RecordedCycle(guide, base, CycleShape(2, 2, 32, 32), 90, marks, memory, counting)

    cycle = {"_cycle_rows": 1, "_draft_verify": 1, "_cycle_advance": 1}
    assert launches("llama", tmp_path, record) == of_passes(3, "llama", **cycle)


def test_a_recorded_cycle_without_drafts_is_one_pass_and_three_launches(tmp_path: Path) -> None:
    def record(decoder: Decoder, counting: Counting) -> None:
        base, marks = Model(decoder, cache_of(decoder)), torch.zeros(90, dtype=torch.uint8)
        memory = cycle_memory(2, decoder.device)
        RecordedCycle(None, base, CycleShape(2, 0, 0, 32), 90, marks, memory, counting)

    cycle = {"_cycle_rows": 1, "_draft_verify": 1, "_cycle_advance": 1}
    assert launches("llama", tmp_path, record) == of_passes(1, "llama", **cycle)
