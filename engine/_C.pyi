"""Row-invariant CPU kernels.  Addresses are those of dense tensors; see csrc/include/nudging/cpu.h."""

from enum import Enum

MAX_HEAD_DIM: int

class Isa(Enum):
    portable = 0
    avx2 = 1
    avx512 = 2
    avx512bf16 = 3

class DType(Enum):
    f32 = 0
    bf16 = 1
    f16 = 2

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
    """Addresses of a decoder's weights, 0 where it has none; a projection is (weight, scales, bias)."""

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
        head: tuple[int, int, int],
        /,
    ) -> None: ...
    def add_layer(
        self,
        qkv: tuple[int, int, int],
        o: tuple[int, int, int],
        gate_up: tuple[int, int, int],
        down: tuple[int, int, int],
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
    /,
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
