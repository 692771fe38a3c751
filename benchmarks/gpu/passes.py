"""Forward passes of one model, recorded and not, against the bytes that they read; and their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.ceilings import BLOCK_SIZE, micro
from benchmarks.gpu.parts import Figure, Found
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import recorder_of, time_on_device, time_on_host, wait
from nudging.executor.batch import BatchBuffer, BatchShape
from nudging.executor.cuda_graphs import PickBuffer, RecordedPass, RecordedPath
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache

# What a clock has to decide: see kernels/gpu/configs.py.
CONFIGS: dict[str, dict[str, bool]] = {
    "norms of their own": {"fused_norms": False},
    "starting early": {"pdl": True},
}
PATH = 4
SHOWN_KERNELS = 15


@dataclass(frozen=True)
class Load:
    """A batch as decoding has it: `seqs` texts of `context` tokens, `rows` of them new."""

    seqs: int
    rows: int
    context: int


class Model:
    """A decoder with a cache for one load, filled with noise: nothing that is read is zero."""

    def __init__(self, decoder: Decoder, load: Load) -> None:
        config, self.decoder, self.load = decoder.config, decoder, load
        self.width = -(-(load.context + PATH) // BLOCK_SIZE)
        self.cache = KVCache(
            config.num_layers,
            load.seqs * self.width,
            BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            decoder.dtype,
            decoder.device,
        )
        self.cache.k.normal_()
        self.cache.v.normal_()

    @property
    def num_bytes(self) -> int:
        """What a pass reads at least: the weights but for an embedding that is no head, and the cache."""
        embed, head = self.decoder.weights.embed, self.decoder.weights.head
        weights = self.decoder.weight_bytes - (0 if head is embed else embed.nbytes)
        config, load = self.decoder.config, self.load
        token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.decoder.dtype.itemsize
        return weights + load.seqs * load.context * token

    def buffers(self, rows: int, behind: int = 0) -> tuple[BatchBuffer, PickBuffer]:
        """A batch of `rows` rows for each text, `behind` tokens behind its context, all answered."""
        load, device = self.load, self.decoder.device
        end, count = load.context + behind, load.seqs * rows
        buffer = BatchBuffer(BatchShape(count, load.seqs, self.width, count), device, self.cache.spare_slot)
        texts = torch.arange(load.seqs)[:, None]
        positions = torch.arange(end - rows, end)[None, :].expand(load.seqs, rows)
        fields = {
            "ids": torch.arange(count) % 97 + 300,
            "positions": positions.flatten(),
            "slot_mapping": (texts * self.width * BLOCK_SIZE + positions).flatten(),
            "cu_seqlens_q": torch.arange(load.seqs + 1) * rows,
            "seq_lens": torch.full((load.seqs,), end),
            "block_tables": torch.arange(load.seqs * self.width).view(load.seqs, self.width),
            "logit_rows": torch.arange(count),
        }
        for name, values in fields.items():
            getattr(buffer.batch, name).copy_(values)
        picks = PickBuffer(count, device)
        picks.fill([])
        return buffer, picks

    def forward(self) -> Callable[[], None]:
        """What runs a pass kernel by kernel, logits and all."""
        batch = self.buffers(self.load.rows)[0].batch

        def run() -> None:
            self.decoder.forward(batch, self.cache)

        return run

    def recorded(self) -> RecordedPass:
        buffers = self.buffers(self.load.rows)
        vocab, device = self.decoder.config.vocab_size, self.decoder.device
        return RecordedPass(self.decoder, self.cache, *buffers, vocab, recorder_of(device))

    def path(self) -> RecordedPath:
        made = [self.buffers(1, step + 1) for step in range(PATH)]
        vocab, device = self.decoder.config.vocab_size, self.decoder.device
        first = torch.full((self.load.seqs,), 300, dtype=torch.int32, device=device)
        buffers, picks = zip(*made, strict=True)
        return RecordedPath(self.decoder, self.cache, buffers, picks, first, vocab, recorder_of(device))


def loads(scale: Scale) -> list[Load]:
    """One text with drafts of several lengths, and in longer contexts; and many texts."""
    alone = [Load(1, rows, scale.contexts[0]) for rows in dict.fromkeys((1, 5, scale.rows[-1]))]
    alone += [Load(1, 1, context) for context in scale.contexts[1:]]
    return alone + [Load(seqs, 1, scale.contexts[0]) for seqs in scale.batches[len(scale.batches) // 2 :]]


@torch.inference_mode()
def passes(decoder: Decoder, scale: Scale, bandwidth: float) -> Found:
    """Passes of all loads, recorded; those of one row kernel by kernel, too; and a path."""
    found, device = Found(), decoder.device
    for load in loads(scale):
        model = Model(decoder, load)
        bound = model.num_bytes / bandwidth
        what = f"{load.seqs} texts of {load.context}, {load.rows} rows each"
        if load == Load(1, 1, scale.contexts[0]):
            spread = time_on_host(model.forward(), device, scale.repeats)
            found.figures.append(micro(f"pass kernel by kernel: {what}", spread, bound))
            path = model.path()
            spread = time_on_device(path.replay, device, scale.repeats)
            found.figures.append(micro(f"path of {PATH} recorded: {what}", spread, PATH * bound))
        spread = time_on_device(model.recorded().replay, device, scale.repeats)
        found.figures.append(micro(f"pass recorded: {what}", spread, bound))
        if load.seqs == 1 and load.context == scale.contexts[0]:
            for name, changes in configs_for(device).items():
                with configured(device, **changes):
                    spread = time_on_device(model.recorded().replay, device, scale.repeats)
                found.figures.append(micro(f"pass recorded, {name}: {what}", spread, bound))
    return found


def configs_for(device: torch.device) -> dict[str, dict[str, bool]]:
    """Those of CONFIGS that the device can run."""
    early = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return {name: changes for name, changes in CONFIGS.items() if early or "pdl" not in changes}


@contextmanager
def configured(device: torch.device, **changes: Any) -> Iterator[None]:
    """Inside, kernels work by a table of the device that differs in these entries."""
    if device.type != "cuda":
        yield
        return
    from nudging.kernels.gpu.common.configs import TABLE, config_of

    changed = replace(config_of(device), **changes)
    with mock.patch.dict(TABLE, {torch.cuda.get_device_capability(device): changed}):
        yield


@torch.inference_mode()
def profiled(decoder: Decoder, scale: Scale) -> Found:
    """Which kernels a recorded pass and a path of one text consist of, with the most time first."""
    model = Model(decoder, Load(1, 1, scale.contexts[0]))
    found = Found()
    for name, recorded in (("pass", model.recorded()), ("path", model.path())):
        kernels, total = kernels_of(recorded.replay, decoder.device)
        found.details[name] = kernels
        found.figures.append(Figure(f"kernels of one {name}", sum(k["count"] for k in kernels), ""))
        found.figures.append(Figure(f"time in kernels of one {name}", total, "us"))
        found.details[name] = kernels[:SHOWN_KERNELS]
    return found


def kernels_of(replay: Callable[[], None], device: torch.device) -> tuple[list[dict[str, Any]], float]:
    """Name, number and microseconds of every kernel of one replay; the microseconds of all of them."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    replay()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        replay()
        wait(device)
    listed = []
    for one in profiler.key_averages():
        spent = one.self_device_time_total if on_gpu else one.self_cpu_time_total
        if spent > 0:
            listed.append({"name": one.key[:120], "count": one.count, "us": round(spent, 2)})
    listed.sort(key=lambda kernel: -float(kernel["us"]))
    return listed, sum(kernel["us"] for kernel in listed)
