"""A decoder that is a plain function of the ids it reads, through a real paged cache; and a tokenizer.

The decoder writes the ids it is fed into its cache and reads every prefix back through the block tables: a
wrong slot, a block that was given away or a stale copy gives a wrong row.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nudging.core.engine import Engine
from nudging.executor.model_runner import ModelRunner
from nudging.models.batch import Batch
from nudging.models.kv_cache import KVCache
from nudging.text.chat_template import plain_chat_template
from nudging.text.roles import Role
from nudging.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = 32
    num_layers: int = 1
    num_kv_heads: int = 1
    head_dim: int = 1
    max_len: int = 4096


class FakeDecoder:
    """`logits(ids)` is the row [vocab] fp32 after `ids`."""

    dtype = torch.float32
    device = torch.device("cpu")
    weight_bytes = 1000
    head_share = 0.5
    precision = "float32"

    def __init__(self, logits: Callable[[list[int]], Tensor], vocab: int = 32) -> None:
        self.config = FakeConfig(vocab)
        self.logits = logits

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        slots = kv.k.view(-1)
        slots[batch.slot_mapping] = batch.ids.float()
        cached, size = slots.tolist(), kv.block_size
        ends, tables, positions = (
            t.tolist() for t in (batch.cu_seqlens_q, batch.block_tables, batch.positions)
        )
        rows = []
        for row in batch.logit_rows.tolist():
            table = tables[bisect.bisect_right(ends, row) - 1]
            prefix = [cached[table[p // size] * size + p % size] for p in range(positions[row] + 1)]
            rows.append(self.logits([int(token) for token in prefix]))
        return torch.stack(rows) if rows else torch.empty((0, self.config.vocab_size))


class TableTokenizer(Tokenizer):
    """Any tokens at all; it cuts nothing."""

    def __init__(self, table: list[bytes]) -> None:
        super().__init__(table, (), bos_id=None, eos_id=None, drops_first_space=False, rules=("none", ""))

    def _encode(self, text: str, special: bool) -> list[int]:
        raise NotImplementedError

    def _cut(self, text: str) -> list[int]:
        raise NotImplementedError


@dataclass(frozen=True)
class FixedCosts:
    """A pass costs `step` plus `row` for each row and `answer` for each answer."""

    step: float
    row: float = 0.0
    answer: float = 0.0

    def of(self, rows: float, answers: float) -> float:
        return self.step + self.row * rows + self.answer * answers

    def record(self, rows: int, answers: int, seconds: float) -> None:
        """Timings change nothing."""


def fake_engine(
    models: dict[str, Callable[[list[int]], Tensor]],
    costs: dict[str, FixedCosts] | None = None,
    num_blocks: int = 200,
    vocab: int = 32,
    max_batch_tokens: int = 2048,
    carries: bool = True,
    prefix_caching: bool = True,
) -> tuple[Engine, dict[str, Role]]:
    """An engine over fake models, one for each role, and the roles; no end of sequence, no text."""
    decoders = {name: FakeDecoder(model, vocab) for name, model in models.items()}
    runners = {name: ModelRunner(one, num_blocks, 4, prefix_caching) for name, one in decoders.items()}
    for runner in runners.values():
        runner.poison()
    template = plain_chat_template()
    roles = {name: Role(name, name, None, template, frozenset(), vocab, 4096) for name in models}
    models_of = {name: name for name in models}
    return Engine(runners, models_of, max_batch_tokens, costs, carries=carries), roles
