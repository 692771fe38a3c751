"""One model with its cache: executes a step's work as one ragged batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from nudging import _C
from nudging.core.block_pool import BlockPool
from nudging.core.fast_path import FastPath
from nudging.core.rows import Row, Rows
from nudging.core.speculation.pass_costs import CycleTime
from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.errors import NumericalError
from nudging.executor.batch import BatchBuilder
from nudging.executor.flash_prefill import with_prefill
from nudging.executor.sampler import TorchSampler, decide, tell
from nudging.kernels.cpu import use_team
from nudging.kernels.flash_attn import FlashAttn
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache


class ModelRunner:
    """A decoder, its block pool and its cache of `num_blocks` blocks; `team`: the threads of CPU ops;
    `flash`: what computes the attention of prompts, if not our kernel.
    """

    # What the last cycle took that it computed, until somebody has taken note of it.
    cycle_time: CycleTime | None = None
    # What reads logits for the host.
    sampler = TorchSampler()

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        team: _C.Team | None = None,
        flash: FlashAttn | None = None,
    ) -> None:
        config = decoder.config
        self.decoder = decoder
        self.team = team or _C.Team(torch.get_num_threads())
        self.pool = BlockPool(num_blocks, block_size, prefix_caching)
        self.cache = KVCache(
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
            decoder.dtype,
            decoder.device,
        )
        # How many passes the last `execute` took: none where its rows had been computed before, or where it
        # took what such passes will not take again.
        self.passes_made = 1
        self._flash = flash
        self._builder = BatchBuilder(block_size, decoder.device, self.cache.spare_slot)

    @property
    def takes_fast_path(self) -> bool:
        """Whether `execute` computes what the fast path has planned."""
        return self._flash is None

    @property
    def weight_bytes(self) -> int:
        """How many bytes of weights a pass reads."""
        return self.decoder.weight_bytes

    @property
    def head_share(self) -> float:
        """The part of them that the head reads."""
        return self.decoder.head_share

    @property
    def precision(self) -> str:
        """What declares the bits of a row: the weights' precision, and who else than our kernels computes."""
        weights = self.decoder.precision
        return weights if self._flash is None else f"{weights}, prompts by {self._flash.name}"

    @torch.inference_mode()
    def execute(
        self, works: list[Work], wanted: list[Wanted], fast_path: FastPath | None = None
    ) -> list[Rows | None]:
        """For each work its rows, or None: this work is put off, and is planned again in the next step.
        `wanted` says what each row is asked for.  When it returns, the device is done.  What `fast_path` has
        planned is computed in the same pass, and told to them.
        """
        self.cache.copy_blocks([pair for work in works for pair in work.copies])
        batch = self._builder.build(works, None if fast_path is None else fast_path.core)
        if self._flash is not None:
            batch = with_prefill(self._flash, batch, works)
        with use_team(self.team):
            logits = self.decoder.forward(batch, self.cache)
            if fast_path is not None:
                logits = tell(fast_path, logits)
            rows = decide(logits, wanted)
        if not wanted and fast_path is None and self.decoder.device.type == "cuda":
            # Nobody has waited for the pass: its cost would go unseen, and its batch be overwritten.
            torch.cuda.current_stream(self.decoder.device).synchronize()
        return [*by_work(rows, works)]

    def logits(self, ids: list[int]) -> Tensor:
        """What the model says after each prefix of `ids`: [len(ids), vocab] fp32, on the host."""
        return self.decoder.logits(ids).cpu()

    def record_ahead(self, texts: int) -> bool:
        """Record one more pass for a batch of so many texts that may come; False where none is left, or
        nothing is recorded.
        """
        return False

    def close(self) -> None:
        """Execute nothing any more; what is still under way has ended when it returns."""

    def poison(self) -> None:
        """Fill every slot with NaN (tests: what is read without having been written cannot hide)."""
        self.cache.k.fill_(float("nan"))
        self.cache.v.fill_(float("nan"))


def by_work(rows: Iterable[Row | NumericalError], works: Iterable[Work]) -> Iterator[Rows]:
    """The rows of a pass, dealt out to its works."""
    left = iter(rows)
    for work in works:
        yield list(islice(left, work.answers))
    assert next(left, None) is None, "a pass has answered more rows than its works have"


def block_bytes(decoder: Decoder, block_size: int) -> int:
    """The bytes of one block of a model's cache, keys and values of all layers."""
    config = decoder.config
    element = torch.finfo(decoder.dtype).bits // 8
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * element
