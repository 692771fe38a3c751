"""One model with its cache: executes a step's work as one ragged batch."""

from __future__ import annotations

import torch

from nudging.batch import KVCache, build_batch
from nudging.blocks import BlockPool
from nudging.decide import Wanted, decide
from nudging.errors import NumericalError
from nudging.models.decoder import Decoder
from nudging.scheduler import Work
from nudging.sequence import Row


class ModelRunner:
    """A decoder, its block pool and its cache of `num_blocks` blocks."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        config = decoder.config
        self.decoder = decoder
        self.pool = BlockPool(num_blocks, block_size)
        self.cache = KVCache(
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
            decoder.dtype,
            decoder.device,
        )

    @torch.inference_mode()
    def execute(self, works: list[Work], wanted: list[Wanted]) -> list[Row | NumericalError]:
        """The rows of all works, in order; `wanted` says what each row is asked for."""
        self.cache.copy_blocks([pair for work in works for pair in work.copies])
        batch = build_batch(works, self.pool.block_size, self.decoder.device)
        return decide(self.decoder.forward(batch, self.cache), wanted)

    def poison(self) -> None:
        """Fill every slot with NaN (tests: what is read without having been written cannot hide)."""
        self.cache.k.fill_(float("nan"))
        self.cache.v.fill_(float("nan"))


def block_bytes(decoder: Decoder, block_size: int) -> int:
    """The bytes of one block of a model's cache, keys and values of all layers."""
    config = decoder.config
    element = torch.finfo(decoder.dtype).bits // 8
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * element
