"""Passes that are recorded once and replayed, checked without a device that records.

`Recording` stands in for one: what it records runs under a watch that refuses everything a graph cannot hold
(waiting for the device, shapes that depend on data, memory that moves), and is run again at every replay.
"""

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nudging import LLM, Base, Guide, Nudging, NumericalError, SamplingParams
from nudging.core.sequence import Sequence
from nudging.core.work import Work
from nudging.executor.batch import IMPOSSIBLE_BLOCK, BatchBuffer, BatchShape
from nudging.executor.cuda_graphs import SIZES, padded, path_shape
from nudging.executor.graph_runner import GraphRunner
from nudging.kernels.draft_verify import Verified, draft_verify
from nudging.kernels.lm_head import lm_head
from nudging.kernels.rms_norm import Norm
from nudging.models.batch import Batch
from nudging.models.kv_cache import KVCache
from tests.support.pairs import Twin, assert_pools_are_whole, at_once, written

# What makes the host wait for a device, or lets sizes depend on what was computed.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Refuses what a recording cannot hold; lists what is allocated meanwhile, and where all else lies."""

    def __init__(self, allocated: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.allocated = allocated
        self.addresses: set[int] = set()
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(word) for word in WAITS), f"{name} in a recording"
        out = func(*args, **(kwargs or {}))
        known = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name != "clone":  # of what a stand-in for one kernel made; see `one_kernel`
            self.addresses |= known - self._own
        fresh = [x for x in made if storage_of(x) not in known]
        self._own |= set(map(storage_of, fresh))
        self.allocated += map(weakref.ref, fresh)
        return out


def storage_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Recording:
    """Replays by running again, under the watch; counts both.

    All recordings have one pool of memory: what one allocated is overwritten when another one is replayed.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = self.waited = 0
        self.allocated: list[weakref.ref[Tensor]] = []

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        addresses: set[int] = set()

        def replay() -> None:
            self.replayed += 1
            for x in filter(None, (ref() for ref in self.allocated)):
                x.fill_(-1)
            self.allocated.clear()
            watch = Watch(self.allocated)
            with watch:
                run()
            assert not addresses or watch.addresses <= addresses, "memory has moved"
            addresses.update(watch.addresses)

        return replay

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waited += 1

        return wait

    def has_room(self) -> bool:
        return True


def one_kernel(*args: Any) -> Tensor:
    """The head as a GPU runs it; its reference, made of several ops, waits for what it computes."""
    with _disable_current_modes():
        return lm_head(*args)


def one_replay(*args: Any) -> Verified:
    """The policy's replay as a GPU runs it."""
    with _disable_current_modes():
        said = draft_verify(*args)
    return Verified(*(column.clone() for column in said))


def recording_llm(monkeypatch: pytest.MonkeyPatch, recording: Recording, **options: Any) -> LLM:
    """An LLM on the CPU whose models run from recordings; none are made ahead unless it is asked for."""

    def runner(
        decoder: Any, num_blocks: int, block_size: int, prefix_caching: bool, team: Any, flash: Any
    ) -> GraphRunner:
        made = GraphRunner(decoder, num_blocks, block_size, recording, prefix_caching, flash)
        made.poison()
        return made

    monkeypatch.setattr("nudging.api.loading.make_runner", runner)
    monkeypatch.setattr("nudging.executor.cuda_graphs.lm_head", one_kernel)
    monkeypatch.setattr("nudging.executor.cycles.recorded_cycle.draft_verify", one_replay)
    llm = LLM(**({"kv_cache_memory": "4MiB", "record_ahead": False} | options))
    # What passes take is the same in every run: prices say what is drafted and in which order models go.
    seconds = partial(next, itertools.count(step=1 / 128))
    llm._engine.clock = seconds
    for made in llm._engine.runners.values():
        assert isinstance(made, GraphRunner)
        for overlap in made.overlaps:
            overlap._clock = seconds
    return llm


JOBS = [
    (Base(), "off", {}),
    (Guide(), "off", {}),
    (Nudging(0.4, "token"), "off", {}),
    (Nudging(0.4, "token"), 4, {}),
    (Nudging(0.4, "token"), "auto", {}),
    (Nudging(0.4, "word"), 3, {}),
    (Nudging(0.4, "word"), "auto", {}),
    (Nudging(0.4, "token"), 3, {"temperature": 1.0, "seed": 5}),
    (Nudging(0.4, "word"), 8, {"temperature": 0.7, "seed": 2**64 - 3}),
    (Guide(), "off", {"temperature": 1.0, "seed": 2**63, "top_p": 0.8}),
    (Nudging(0.4, "token"), 3, {"logprobs": 2}),
    (Nudging(0.4, "token"), 8, {"logit_bias": {7: 3.0}}),
]


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
def test_recorded_passes_write_the_same_text(
    tiny_pair: dict[str, Path], dtype: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a batch, at prompts of several lengths, with drafts and without."""
    prompts = [[60 + i + j for j in range(3 + 7 * i)] for i in range(len(JOBS))]
    params = [SamplingParams(max_tokens=30, ignore_eos=i % 2 == 0, **JOBS[i][2]) for i in range(len(JOBS))]
    options = {**tiny_pair, "dtype": dtype, "quantization": quantization}
    with LLM(**options, kv_cache_memory="4MiB") as plain:  # type: ignore[arg-type]
        expected = [
            written(plain.generate(prompt, p, policy, speculate)[0].outputs[0])
            for prompt, p, (policy, speculate, _) in zip(prompts, params, JOBS, strict=True)
        ]
    recording = Recording()
    with recording_llm(monkeypatch, recording, **options) as llm:
        for _ in range(2):
            handles = [
                llm.submit(prompt, p, policy, speculate)
                for prompt, p, (policy, speculate, _) in zip(prompts, params, JOBS, strict=True)
            ]
            assert [written(handle.result().outputs[0]) for handle in handles] == expected
        for prompt, p, (policy, speculate, _), want in zip(prompts, params, JOBS, expected, strict=True):
            assert written(llm.generate(prompt, p, policy, speculate)[0].outputs[0]) == want
    assert recording.recorded > 0
    assert recording.replayed > 3 * recording.recorded


def test_a_draft_is_one_recording(tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's tokens go from pass to pass on the device: the host starts two replays a draft."""
    recording = Recording()
    with recording_llm(monkeypatch, recording, **tiny_pair) as llm:
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        llm.generate([60, 61], params, Nudging(1.5, "token"), 8)
        before = recording.replayed
        stats = llm.generate([60, 61], params, Nudging(0.0, "token"), 8)[0].outputs[0].stats
    assert stats.guide_passes > 2 * stats.base_passes
    drafts = sum(stats.accepted_lengths)
    # One of the base, the guide's catching up and its path; new shapes run as they are.
    assert recording.replayed - before <= 3 * drafts


def test_one_bad_row_in_a_path_ends_its_request_alone(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (40, 10))
    recording = Recording()
    with recording_llm(monkeypatch, recording, **tiny_pair) as llm:
        policy = Nudging(1.5, "word")
        # Three times: the first ones run as they are and are recorded.
        whole, expected = [llm.generate([[60], [70]], [long, short], policy) for _ in range(3)][0]
        runner = llm._engine.runners[llm.roles["guide"].model]
        assert isinstance(runner, GraphRunner)
        before_head = runner.decoder.before_head

        def poisoned(batch: Batch, kv: KVCache) -> tuple[Tensor, Norm | None]:
            x, norm = before_head(batch, kv)
            with _disable_current_modes():  # the watch knows no such read
                return torch.where(batch.positions[:, None] < 20, x, float("nan")), norm

        monkeypatch.setattr(runner.decoder, "before_head", poisoned)
        bad, good = (result.outputs[0] for result in llm.generate([[60], [70]], [long, short], policy))
        assert (bad.finish_reason, type(bad.error)) == ("error", NumericalError)
        assert 0 < len(bad.token_ids) <= 20
        assert bad.token_ids == whole.outputs[0].token_ids[: len(bad.token_ids)]
        assert written(good) == written(expected.outputs[0])
        assert recording.replayed > 0


def work(tokens: int, start: int, end: int, blocks: list[int]) -> Work:
    class Table:
        ids = blocks

    class Owner:
        sequences: dict[str, Any] = {}

    sequence = Sequence.__new__(Sequence)
    sequence.tokens = list(range(100, 100 + tokens))
    sequence.block_table = Table()  # type: ignore[assignment]
    owner = Owner()
    owner.sequences = {"base": sequence}
    return Work(owner, "base", start, end, end)  # type: ignore[arg-type]


def test_padding_is_a_sequence_of_its_own_in_no_pools_block() -> None:
    works = [work(9, 6, 9, [3, 5, 7]), work(4, 3, 4, [1])]
    buffer = BatchBuffer(BatchShape(6, 4, 8, 3), torch.device("cpu"), spare_slot=4000)
    for _ in range(2):
        batch = buffer.fill(works, 4)
        assert batch.ids.tolist() == [106, 107, 108, 103, 0, 0]
        assert batch.positions.tolist() == [6, 7, 8, 3, 0, 0]
        assert batch.slot_mapping.tolist() == [22, 23, 28, 7, 4000, 4000]
        assert batch.cu_seqlens_q.tolist() == [0, 3, 4, 4, 6]
        assert batch.seq_lens.tolist() == [9, 4, 0, 2]
        assert batch.logit_rows.tolist() == [2, 3, 0]
        assert batch.block_tables[0].tolist() == [3, 5, 7] + [IMPOSSIBLE_BLOCK] * 5
        assert batch.block_tables[1].tolist() == [1] + [IMPOSSIBLE_BLOCK] * 7
        assert batch.block_tables[2].tolist() == [IMPOSSIBLE_BLOCK] * 8
        assert batch.block_tables[3].tolist() == [1000] * 8
        # What an earlier, larger batch left must not shine through.
        buffer.fill([work(16, 10, 16, [9, 9, 9, 9])], 4)


def test_shapes_are_few() -> None:
    shapes = {
        padded([work(40, 40 - rows, 40, [0] * 10) for _ in range(seqs)], 4)
        for rows in range(1, 17)
        for seqs in range(1, 33)
    }
    assert None not in shapes
    assert len(shapes) < 16 * 32 * 0.75
    assert all(shape is not None and shape.rows in SIZES for shape in shapes)
    assert padded([work(40, 20, 40, [0] * 10)], 4) is None, "a prompt is not recorded"


def test_tables_hold_the_longest_path_behind_the_longest_text() -> None:
    """A text without a path of its own goes along with the others' to their end."""
    works = [work(128, 127, 128, [0] * 32), work(3, 0, 3, [1])._replace(ahead=15)]
    shape = padded(works, 4)
    assert shape is not None
    assert shape.width == 32
    assert path_shape(shape, works, 15, 4) == BatchShape(2, 3, 64, 2)


def test_beside_a_prompt_that_is_read_in_parts_paths_are_single_passes(
    tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, word = [[60, 61], list(range(60, 120))], Nudging(0.4, "word")
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with recording_llm(monkeypatch, Recording(), **tiny_pair, max_batch_tokens=12) as llm:
        twin = Twin(llm)
        expected = [twin.generate(prompt, params, word) for prompt in prompts]
        for _ in range(3):
            assert [written(r.outputs[0]) for r in at_once(llm, prompts, params, word, 4)] == expected
        assert_pools_are_whole(llm)
