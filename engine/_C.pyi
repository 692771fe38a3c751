"""Row-invariant CPU kernels, and the host half of ordinary steps.  Addresses are those of dense tensors; see
csrc/include/nudging/cpu.h and fast_path.h.
"""

from collections.abc import Callable
from enum import Enum

MAX_HEAD_DIM: int
PANEL: int

class Isa(Enum):
    portable = 0
    avx2 = 1
    avx512 = 2
    avx512bf16 = 3

class DType(Enum):
    f32 = 0
    bf16 = 1
    f16 = 2

class WeightType(Enum):
    f32 = 0
    bf16 = 1
    f16 = 2
    int8 = 3

class Activation(Enum):
    silu = 0
    gelu = 1
    gelu_tanh = 2

class QkNorm(Enum):
    none = 0
    head = 1
    full = 2

class Team:
    """The calling thread and threads - 1 helpers, which sleep while there is nothing to do."""

    def __init__(self, threads: int, /) -> None: ...
    @property
    def threads(self) -> int: ...

class Pages:
    """Zeroed memory on large pages where the system has them, as a writable buffer of bytes."""

    def __init__(self, size: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class DecoderModel:
    """Addresses of a decoder's weights, 0 where it has none; a projection is (weight, scales, bias,
    whether the weight is packed)."""

    def __init__(
        self,
        dtype: DType,
        activation: Activation,
        qk_norm: QkNorm,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        vocab: int,
        max_position: int,
        eps: float,
        attention_scale: float,
        attention_soft_cap: float,
        final_soft_cap: float,
        unit_offset: bool,
        pre_norm: bool,
        post_norm: bool,
        norm: int,
        head: tuple[int, int, int, bool],
        /,
    ) -> None: ...
    def add_layer(
        self,
        qkv: tuple[int, int, int, bool],
        o: tuple[int, int, int, bool],
        gate_up: tuple[int, int, int, bool],
        down: tuple[int, int, int, bool],
        attn_norm: int,
        attn_post_norm: int,
        mlp_norm: int,
        mlp_post_norm: int,
        q_norm: int,
        k_norm: int,
        cos: int,
        sin: int,
        half: int,
        window: int,
        /,
    ) -> None: ...

def decode(
    isa: Isa,
    team: Team,
    model: DecoderModel,
    x: int,
    positions: int,
    slot_mapping: int,
    block_tables: int,
    cu_seqlens_q: int,
    seq_lens: int,
    logit_rows: int,
    k_cache: int,
    v_cache: int,
    logits: int,
    rows: int,
    seqs: int,
    max_blocks: int,
    num_blocks: int,
    block_size: int,
    num_logits: int,
    /,
) -> None: ...
def available_isas() -> list[Isa]:
    """What this processor can run, best first; the last is always `portable`."""

def linear(
    isa: Isa,
    team: Team,
    dtype: DType,
    out_dtype: DType,
    x: int,
    weight: int,
    scales: int,
    bias: int,
    out: int,
    rows: int,
    in_features: int,
    cols: int,
    is_packed: bool,
    /,
) -> None: ...
def pack_weight(team: Team, type: WeightType, weight: int, in_features: int, cols: int, /) -> None: ...
def unpack_columns(
    type: WeightType, weight: int, in_features: int, cols: int, ids: int, count: int, out: int, /
) -> None: ...
def rms_norm(
    isa: Isa,
    team: Team,
    dtype: DType,
    x: int,
    weight: int,
    out: int,
    rows: int,
    dim: int,
    eps: float,
    unit_offset: bool,
    /,
) -> None: ...
def add_rms_norm(
    isa: Isa,
    team: Team,
    dtype: DType,
    x: int,
    y: int,
    weight: int,
    sum: int,
    out: int,
    rows: int,
    dim: int,
    eps: float,
    unit_offset: bool,
    /,
) -> None: ...
def layer_norm(
    isa: Isa, team: Team, dtype: DType, x: int, out: int, rows: int, dim: int, eps: float, /
) -> None: ...
def rope(
    isa: Isa,
    team: Team,
    dtype: DType,
    x: int,
    positions: int,
    cos: int,
    sin: int,
    out: int,
    rows: int,
    heads: int,
    head_dim: int,
    half: int,
    max_position: int,
    /,
) -> None: ...
def rope_append(
    isa: Isa,
    team: Team,
    dtype: DType,
    q: int,
    k: int,
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    positions: int,
    cos: int,
    sin: int,
    q_out: int,
    k_cache: int,
    v_cache: int,
    slot_mapping: int,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    max_position: int,
    slots: int,
    /,
) -> None: ...
def gated_act(
    isa: Isa,
    team: Team,
    dtype: DType,
    activation: Activation,
    gate_up: int,
    out: int,
    rows: int,
    dim: int,
    /,
) -> None: ...
def soft_cap(isa: Isa, team: Team, dtype: DType, logits: int, out: int, size: int, cap: float, /) -> None: ...
def kv_append(
    team: Team,
    k: int,
    v: int,
    k_cache: int,
    v_cache: int,
    slot_mapping: int,
    rows: int,
    row_bytes: int,
    slots: int,
    /,
) -> None: ...
def paged_attention(
    isa: Isa,
    team: Team,
    dtype: DType,
    q: int,
    k_cache: int,
    v_cache: int,
    out: int,
    block_tables: int,
    cu_seqlens_q: int,
    seq_lens: int,
    rows: int,
    seqs: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    num_blocks: int,
    block_size: int,
    max_blocks: int,
    scale: float,
    window: int,
    soft_cap: float,
    /,
) -> None: ...
def softmax_stats(
    isa: Isa,
    team: Team,
    dtype: DType,
    logits: int,
    max: int,
    lse: int,
    argmax: int,
    entropy: int,
    rows: int,
    vocab: int,
    /,
) -> None: ...

# What a carried request's step may read at once: more is a prompt.
DECODE_TOKENS: int

class SequenceState:
    """A role's sequence as it enters or leaves the fast path; see `nudging.core.sequence.Sequence`."""

    begin: int
    tokens: list[int]
    num_computed: int
    context_len: int
    rows: list[tuple[int, int, int, float]]
    blocks: list[int]

    def __init__(
        self,
        model: int,
        prompt_len: int,
        max_len: int,
        max_sequence: int,
        ends: list[int],
        begin: int,
        tokens: list[int],
        num_computed: int,
        context_len: int,
        rows: list[tuple[int, int, int, float]],
        blocks: list[int],
        registered: int,
        own_from: int,
    ) -> None: ...

class CarriedState:
    def __init__(
        self,
        rule: tuple[int, float, bool, int],
        sequences: list[SequenceState],
        output_begin: int,
        output: list[int],
        max_tokens: int,
        draft_len: int,
        vocab: int,
        stop_tokens: list[int],
        stops: list[bytes],
        tail: bytes,
        is_greedy: bool,
        drafts: bool,
        need: tuple[int, int, int, int, bool],
        draft: tuple[int, int, list[int]] | None,
        ledger: int,
        account: int,
    ) -> None: ...

# A carried request as it leaves: sequences, the output from some token on, which token, need and draft.
Left = tuple[
    list[SequenceState],
    list[int],
    int,
    tuple[int, int, int, int, bool],
    tuple[int, int, list[int]] | None,
]
# A carried request's number and one of its answers.
Failed = list[tuple[int, int, int, int]]

class FastPath:
    """Carried requests by number; see `nudging.core.fast_path`."""

    def __init__(
        self,
        pools: list[tuple[object, object, object, int, bool]],
        register: Callable[[int, int, list[int], int], int],
        token_bytes: Callable[[int, int], bytes],
        cost: Callable[[int, float, float], float],
        curve: Callable[[int], tuple[float, float, list[tuple[float, float]]] | None],
    ) -> None: ...
    def __len__(self) -> int: ...
    def enter(self, number: int, state: CarriedState) -> None: ...
    def leave(self, number: int) -> Left: ...
    def look(self, number: int) -> Left: ...
    def counted(self, number: int) -> tuple[list[int], int, int, dict[int, int]]: ...
    def held(self, number: int) -> tuple[int, list[int]]: ...
    def take_written(self, number: int) -> tuple[list[int], list[int]]: ...
    def plan(self, model: int) -> tuple[int, int, list[int]]: ...
    def own(self) -> list[int]: ...
    def claims(self, headroom_blocks: int) -> tuple[list[int], list[tuple[int, int]]]: ...
    def path_lengths(self) -> list[int]: ...
    def ready(self, model: int) -> int: ...
    def cap_paths(self, steps: int, running: int) -> None: ...
    def add_foreign(
        self, tokens: list[int], start: int, end: int, first_row: int, ahead: int, blocks: list[int]
    ) -> None: ...
    def sizes(self, block_size: int) -> tuple[int, int, int, int]: ...
    def fill(
        self,
        memory: int,
        rows: int,
        seqs: int,
        width: int,
        answers: int,
        block_size: int,
        spare_slot: int,
    ) -> None: ...
    def spans(self) -> list[tuple[int, int, int, int, int, list[int], list[int], int]]: ...
    def uniform(self) -> tuple[int, int]: ...
    def vocabularies(self) -> list[int]: ...
    def sampled(self) -> list[tuple[int, int, int, int]]: ...
    def planned(self) -> int: ...
    def tokens(self) -> int: ...
    def answers(self) -> int: ...
    def take_statistics(self, argmax: int, max: int, lse: int, picked: list[tuple[int, int]]) -> Failed: ...
    def take_rows(self, rows: list[tuple[int, int, int, float] | None]) -> Failed: ...
    def onward(self) -> bool: ...
    def forget_prices(self, model: int) -> None: ...
    def advance_before(self, limit: int, sharers: list[float]) -> tuple[list[int], int | None]: ...
