"""flash-attn for prompts: when it is refused, which rows it gets, and what it is asked for.

The packages are stood in for by functions of their signatures that check what they are given as the packages
do, and compute it from what the packages' documentation says their arguments mean.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nudging import LLM, SamplingParams
from nudging.errors import BadRequest
from nudging.executor.flash_prefill import (
    MixedAttention,
    check_prefill_attention,
    read_prefill_attention,
    with_prefill,
)
from nudging.kernels.flash_attn import PACKAGES, FlashAttn, Package
from nudging.kernels.paged_attention import paged_attention
from nudging.models.batch import Batch
from tests.support.cases import Attention

FLASH_3, FLASH_2 = PACKAGES
GPU = torch.device("cuda")


def dense(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, scale: float,
    sides: tuple[int, int], cap: float,
) -> Tensor:  # fmt: skip
    """Attention with `causal=True` as flash-attn defines it: aligned bottom right, the window inclusive."""
    assert table.shape[0] == len(lengths) == len(starts) - 1
    assert int(starts[-1]) == len(q)
    outs = []
    for s, length in enumerate(lengths.tolist()):
        rows = q[int(starts[s]) : int(starts[s + 1])].double()
        assert 0 < len(rows) <= length
        pages = table[s, : -(-length // k.shape[1])].long()
        keys, values = (c[pages].flatten(0, 1)[:length].double() for c in (k, v))
        group = q.shape[1] // k.shape[2]
        weights = torch.einsum("qhd,khd->hqk", rows, keys.repeat_interleave(group, 1)) * scale
        weights = weights if cap == 0 else cap * torch.tanh(weights / cap)
        at = torch.arange(len(rows))[:, None] + length - len(rows)
        key = torch.arange(length)[None, :]
        seen = key <= at
        if sides[0] >= 0:
            seen &= key >= at - sides[0]
        assert sides[1] in (-1, 0)
        probs = torch.softmax(weights.masked_fill(~seen, -torch.inf), -1)
        outs.append(torch.einsum("hqk,khd->qhd", probs, values.repeat_interleave(group, 1)))
    return torch.cat(outs).to(q.dtype)


def check_given(q: Tensor, k: Tensor, v: Tensor, *metadata: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert k.shape == v.shape
    assert k.ndim == 4
    assert q.ndim == 3
    assert q.shape[1] % k.shape[2] == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in metadata)


class StandIn:
    """Both packages' functions; `asked` counts the rows of each call."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert block_table is not None
        assert softmax_scale is not None
        check_given(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
        assert k.shape[1] % 256 == 0
        lengths = cu_seqlens_k.diff()
        assert causal
        assert cu_seqlens_k[0] == 0
        assert max_seqlen_k == lengths.max()
        self._ask(cu_seqlens_q, max_seqlen_q)
        return dense(q, k, v, block_table, cu_seqlens_q, lengths, softmax_scale, window_size, softcap)

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None = None, v: None = None, qv: None = None,
        rotary_cos: None = None, rotary_sin: None = None, cache_seqlens: Tensor | None = None,
        cache_batch_idx: None = None, cache_leftpad: None = None, page_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: None = None, max_seqlen_q: int | None = None,
        rotary_seqlens: None = None, q_descale: None = None, k_descale: None = None, v_descale: None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert page_table is not None
        assert cache_seqlens is not None
        assert cu_seqlens_q is not None
        assert softmax_scale is not None
        check_given(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table)
        assert causal
        self._ask(cu_seqlens_q, max_seqlen_q)
        rest = (softmax_scale, window_size, softcap)
        return dense(q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens, *rest)

    def _ask(self, starts: Tensor, most: int | None) -> None:
        counts = starts.diff().tolist()
        assert most == max(counts)
        self.asked.append(counts)


Installed = Callable[..., StandIn]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Stands in for packages, given as distribution=version; there are no others."""

    def install(**versions: str) -> StandIn:
        stand_in = StandIn()

        def version(name: str) -> str:
            if (key := name.replace("-", "_")) not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[key]

        monkeypatch.setattr("nudging.kernels.flash_attn.version", version)
        for package in PACKAGES:
            monkeypatch.setitem(sys.modules, package.module, stand_in)
        return stand_in

    return install


def with_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))


BOTH = {"flash_attn": "2.8.3.post2", "flash_attn_3": "3.0.0b1"}


@pytest.mark.parametrize(
    ("versions", "gpu", "block_size", "name"),
    [
        (BOTH, 9, 16, "flash-attn-3 3.0.0b1"),
        (BOTH, 9, 256, "flash-attn 2.8.3.post2"),
        (BOTH, 8, 512, "flash-attn 2.8.3.post2"),
        (BOTH, 10, 256, "flash-attn 2.8.3.post2"),
        ({"flash_attn": "2.6.0"}, 9, 256, "flash-attn 2.6.0"),
    ],
)
def test_the_first_package_that_serves_is_taken(
    versions: dict[str, str], gpu: int, block_size: int, name: str, installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    installed(**versions)
    with_gpu(monkeypatch, gpu)
    found = read_prefill_attention("flash-attn", GPU, block_size)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("versions", "gpu", "block_size", "says"),
    [
        ({}, 9, 16, "flash-attn-3 is not installed; flash-attn is not installed"),
        ({"flash_attn": "2.5.9"}, 8, 256, "flash-attn is 2.5.9 and must be from 2.6 to below 3.0"),
        ({"flash_attn": "4.0"}, 8, 256, "flash-attn is 4.0 and must be"),
        ({"flash_attn_3": "unknown"}, 9, 16, "flash-attn-3 is unknown and must be from 3.0 to below 4.0"),
        (
            {"flash_attn": "2.8.3"},
            9,
            16,
            "flash-attn needs a block_size that is a multiple of 256 and it is 16",
        ),
        (
            {"flash_attn": "2.8.3"},
            7,
            256,
            "compute capability 8.x or 9.x or 10.x or 12.x and the GPU has 7.x",
        ),
        (
            {"flash_attn_3": "3.0.0"},
            9,
            64,
            "flash-attn-3 needs a block_size that is less than 64 and it is 64",
        ),
        ({"flash_attn_3": "3.0.0"}, 8, 16, "flash-attn-3 needs compute capability 9.x and the GPU has 8.x"),
    ],
)
def test_what_is_missing_is_named(
    versions: dict[str, str], gpu: int, block_size: int, says: str, installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    installed(**versions)
    with_gpu(monkeypatch, gpu)
    with pytest.raises(BadRequest) as error:
        read_prefill_attention("flash-attn", GPU, block_size)
    assert says in str(error.value)
    assert "use prefill_attention='nudging'" in str(error.value)


def test_a_package_built_for_another_torch_is_refused(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(**BOTH)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    refusal = FLASH_3.open(9, 16)
    assert isinstance(refusal, str)
    assert "flash-attn-3 3.0.0b1 cannot be imported" in refusal


def test_other_values_and_devices_are_refused(tiny_pair: dict[str, Path]) -> None:
    with pytest.raises(
        BadRequest, match="prefill_attention is 'sdpa'; it must be one of nudging, flash-attn"
    ):
        LLM(**tiny_pair, device="cpu", prefill_attention="sdpa")
    with pytest.raises(
        BadRequest, match="needs a CUDA GPU, and the device is cpu; use prefill_attention='nud"
    ):
        LLM(**tiny_pair, device="cpu", prefill_attention="flash-attn")
    assert read_prefill_attention("nudging", torch.device("cpu"), 16) is None


def test_models_that_it_cannot_serve_are_refused() -> None:
    flash = FlashAttn("flash-attn 2.8.3", lambda *_: torch.empty(0))

    def decoder(dtype: torch.dtype, head_dim: int) -> Any:
        return SimpleNamespace(dtype=dtype, config=SimpleNamespace(head_dim=head_dim))

    check_prefill_attention(flash, [decoder(torch.bfloat16, 128), decoder(torch.float16, 256)])
    check_prefill_attention(None, [decoder(torch.float32, 300)])
    with pytest.raises(BadRequest, match="takes bfloat16 or float16, and a model is float32; give dtype="):
        check_prefill_attention(flash, [decoder(torch.float32, 128)])
    for head_dim in (20, 264):
        with pytest.raises(
            BadRequest, match=f"multiple of 8 channels up to 256, and a model's have {head_dim}"
        ):
            check_prefill_attention(flash, [decoder(torch.bfloat16, head_dim)])


def opened(package: Package, installed: Installed) -> tuple[StandIn, FlashAttn, int]:
    """A stand-in, the package over it, and a block size that it takes."""
    stand_in, block_size = installed(**BOTH), 256 if package is FLASH_2 else 16
    flash = package.open(9, block_size)
    assert isinstance(flash, FlashAttn)
    return stand_in, flash, block_size


def mixed(flash: FlashAttn, q: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor) -> Batch:
    """The batch of sequences whose last rows are asked for, as a runner makes it."""
    ends = lengths.tolist()
    works: list[Any] = [
        SimpleNamespace(start=end - count, end=end)
        for end, count in zip(ends, starts.diff().tolist(), strict=True)
    ]
    empty = torch.empty(len(q), dtype=torch.int64)
    return with_prefill(flash, Batch(empty, empty, empty, starts, lengths, tables, empty), works)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.distribution)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 0.0), (1, 0.0), (300, 5.0)])
@pytest.mark.parametrize(
    ("lengths", "queries", "asked"),
    [
        ((40, 300), (40, 17), [40, 17]),  # a whole prompt, and the end of another
        ((50, 9, 290, 64, 33), (1, 9, 290, 16, 33), [290, 33]),  # texts and drafts before, between
    ],
)
def test_prompts_go_to_flash_attn_with_the_meaning_of_the_op(
    package: Package, window: int, soft_cap: float, lengths: Any, queries: Any, asked: list[int],
    installed: Installed,
) -> None:  # fmt: skip
    stand_in, flash, block_size = opened(package, installed)
    case = Attention(lengths, queries, block_size=block_size, window=window, soft_cap=soft_cap)
    q, k, v, tables, starts, ends, scale, *_ = case(1, torch.bfloat16)
    batch = mixed(flash, q, tables, starts, ends)
    assert batch.attention is not None
    out = batch.attention(q, k, v, scale, window, soft_cap)
    assert stand_in.asked == [asked]
    want = paged_attention.reference(q, k, v, tables, starts, ends, scale, window, soft_cap)
    torch.testing.assert_close(out, want, rtol=2**-7, atol=1e-3)
    own = paged_attention(q, k, v, tables, starts, ends, scale, window, soft_cap)
    few = torch.repeat_interleave(torch.tensor(queries) <= 16, torch.tensor(queries))
    assert torch.equal(out[few], own[few])


def test_passes_without_prompts_keep_the_op(installed: Installed) -> None:
    _, flash, block_size = opened(FLASH_3, installed)
    q, _, _, tables, starts, ends, *_ = Attention((40, 300), (1, 16), block_size=block_size)(
        1, torch.bfloat16
    )
    assert mixed(flash, q, tables, starts, ends).attention is None


def test_an_engine_reads_prompts_with_it_and_says_so(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, flash, _ = opened(FLASH_3, installed)
    monkeypatch.setattr("nudging.models.decoder.serves", lambda *_: False)
    prompt, text = [60 + i % 37 for i in range(50)], list(range(70, 82))

    def score() -> tuple[list[float], set[str]]:
        with LLM.pocket(device="cpu", dtype="bfloat16") as llm:
            llm.generate([prompt, [70, 80]], SamplingParams(max_tokens=12))
            return llm.score(prompt, text), set(llm.stats().precision.values())

    ours, precision = score()
    assert precision == {"bfloat16"}
    assert not stand_in.asked
    monkeypatch.setattr("nudging.api.llm.read_prefill_attention", lambda *_: flash)
    theirs, precision = score()
    assert precision == {"bfloat16, prompts by flash-attn-3 3.0.0b1"}
    assert stand_in.asked
    assert all(count > 16 for counts in stand_in.asked for count in counts)
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.distribution)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (100, 0.0), (0, 30.0)])
def test_on_a_gpu_it_agrees_with_our_kernel(
    package: Package, dtype: torch.dtype, window: int, soft_cap: float
) -> None:
    block_size = 256 if package is FLASH_2 else 16
    flash = package.open(torch.cuda.get_device_capability()[0], block_size)
    if isinstance(flash, str):
        pytest.skip(flash)
    case = Attention((900, 700, 33), (900, 40, 1), 8, 2, 128, block_size, window, soft_cap)
    args = case(1, dtype)
    q, k, v, tables, starts, ends = (one.cuda() for one in args[:6])
    batch = mixed(flash, q, tables, starts, ends)
    assert isinstance(batch.attention, MixedAttention)
    out = batch.attention(q, k, v, *args[6:])
    want = paged_attention(q, k, v, tables, starts, ends, *args[6:])
    torch.testing.assert_close(out, want, rtol=2**-6, atol=2**-7)
