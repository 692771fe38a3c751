"""What a runner and its batches do for a device with memory of its own, without one."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nudging import Base
from nudging.core.work import Work
from nudging.executor.batch import IMPOSSIBLE_BLOCK, BatchBuffer, BatchBuilder, shape_of
from nudging.executor.batch import _fields as fields
from nudging.models.batch import Batch
from tests.core.test_scheduler import request, small_engine


def work(name: str, start: int, end: int, first_row: int) -> Work:
    """A request for the base that has its blocks up to `end`."""
    engine, roles = small_engine(20)
    job = request(roles, name, 12, 9, Base())
    engine.scheduler.add(job)
    job.sequences["base"].prepare_write(start, end)
    return Work(job, "base", start, end, first_row)


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            assert value.tolist() == getattr(other, name).tolist(), name


def test_a_device_of_its_own_memory_gets_the_whole_batch() -> None:
    works = [work("a", 0, 7, 7), work("b", 4, 6, 6)]
    shape, cpu = shape_of(works, 4), torch.device("cpu")
    here, there = (BatchBuffer(shape, cpu, 80) for _ in range(2))
    there._device = torch.full_like(there._host, 255)
    there.batch = Batch(*fields(there._device, shape))
    expected = here.fill(works, 4)
    assert_same(there.fill(works, 4), expected)
    assert expected.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert (expected.cu_seqlens_q.tolist(), expected.seq_lens.tolist()) == ([0, 7, 9], [7, 6])
    assert expected.logit_rows.tolist() == [6, 8]


def test_a_larger_shape_has_one_more_sequence_that_owns_what_pads_it() -> None:
    works = [work("a", 0, 7, 7)]
    exact = shape_of(works, 4)
    buffer = BatchBuffer(exact._replace(rows=10, seqs=3, answers=4), torch.device("cpu"), 80)
    batch = buffer.fill(works, 4)
    assert batch.ids.tolist()[7:] == batch.positions.tolist()[7:] == [0, 0, 0]
    assert batch.slot_mapping.tolist()[7:] == [80, 80, 80]
    assert (batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()) == ([0, 7, 7, 10], [7, 0, 3])
    assert batch.logit_rows.tolist() == [6, 0, 0, 0]
    assert [set(row) for row in batch.block_tables.tolist()][1:] == [{IMPOSSIBLE_BLOCK}, {20}]


def test_the_shapes_used_last_keep_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nudging.executor.batch.KEPT_SHAPES", 2)
    builder = BatchBuilder(4, torch.device("cpu"), 80)
    a, b, c = ([work("a", 0, end, end)] for end in (3, 5, 7))
    kept = builder.build(a)
    builder.build(b)
    assert builder.build(a) is kept
    builder.build(c)
    assert builder.build(a) is kept, "the other one was not used for longer"
    assert len(builder._buffers) == 2


def test_a_pass_that_answers_nobody_is_waited_for_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its cost would go unseen, and its batch be overwritten.  Only the stream is waited for: CUDA lets
    nobody wait for a device while another engine records on it.
    """
    waited: list[torch.device] = []

    def stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    engine, roles = small_engine(20, max_batch_tokens=4)
    gpu = torch.device("cuda")
    engine.runners["base"].decoder.device = gpu  # type: ignore[assignment]
    engine.add(request(roles, "r", 10, 2))
    for passes in ([gpu], [gpu] * 2, [gpu] * 2, [gpu] * 2):
        engine.step()
        assert waited == passes
