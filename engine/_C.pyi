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

def available_isas() -> list[Isa]:
    """What this processor can run, best first; the last is always `portable`."""

def linear(
    isa: Isa,
    threads: int,
    dtype: DType,
    out_dtype: DType,
    x: int,
    weight: int,
    bias: int,
    out: int,
    rows: int,
    in_features: int,
    cols: int,
    /,
) -> None: ...
def rms_norm(
    isa: Isa,
    threads: int,
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
    threads: int,
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
    isa: Isa, threads: int, dtype: DType, x: int, out: int, rows: int, dim: int, eps: float, /
) -> None: ...
def rope(
    isa: Isa,
    threads: int,
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
    threads: int,
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
    threads: int,
    dtype: DType,
    activation: Activation,
    gate_up: int,
    out: int,
    rows: int,
    dim: int,
    /,
) -> None: ...
def soft_cap(
    isa: Isa, threads: int, dtype: DType, logits: int, out: int, size: int, cap: float, /
) -> None: ...
def kv_append(
    threads: int,
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
    threads: int,
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
    threads: int,
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
