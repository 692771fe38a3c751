"""What the device can do, and how near the ops come to it: bandwidth, the gap between kernels, products with
a weight, the head, attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bandwidth import plain_memory, read_bandwidth
from benchmarks.gpu.parts import Figure, Found
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import Spread, time_on_device, time_recorded
from benchmarks.inflate import Layout
from nudging.kernels.gated_linear import gated_linear
from nudging.kernels.linear import linear
from nudging.kernels.linear_add import linear_add
from nudging.kernels.lm_head import lm_head
from nudging.kernels.paged_attention import paged_attention
from nudging.kernels.rms_norm import Norm

BLOCK_SIZE = 16
Weights = tuple[Tensor, ...]
Product = Callable[[Tensor, Tensor], Tensor]
LINEARS: dict[str, Product] = {"linear": linear, "torch's linear": functional.linear}


def micro(what: str, spread: Spread, bound: float | None = None) -> Figure:
    """A time in microseconds; `spread` and `bound` are in seconds."""
    lower, median, upper = (1e6 * one for one in spread)
    return Figure(what, median, "us", None if bound is None else 1e6 * bound, lower, upper)


def bandwidths(device: torch.device, scale: Scale) -> tuple[float, float]:
    """Bytes per second that are read and that are copied (read and written)."""
    source = plain_memory(scale.memory, torch.int32, device).random_()
    target = torch.empty_like(source)
    copied = time_on_device(lambda: target.copy_(source), device, scale.repeats)
    if device.type != "cuda":
        return read_bandwidth(device, scale.memory), 2 * source.nbytes / copied[1]
    from benchmarks.gpu.kernels import BLOCK, read

    sums = torch.empty(-(-source.numel() // BLOCK), dtype=torch.int32, device=device)
    done = time_on_device(lambda: read(source, sums), device, scale.repeats)
    assert sums[0] == source[:BLOCK].sum().to(torch.int32), "the kernel that reads does not read"
    return source.nbytes / done[1], 2 * source.nbytes / copied[1]


def node_gap(device: torch.device, scale: Scale) -> Found:
    """A kernel that does nothing, in a recording of many: what each kernel of a pass costs at least."""
    x = torch.zeros(1, device=device)
    step: Callable[[], object] = lambda: x.add_(1)  # noqa: E731
    if device.type == "cuda":
        from benchmarks.gpu.kernels import nothing

        step = lambda: nothing(x)  # noqa: E731

    def run() -> None:
        for _ in range(scale.nodes):
            step()

    return Found(
        [micro("an empty kernel in a graph", time_recorded(run, device, scale.repeats, scale.nodes))]
    )


def layout_products(layout: Layout) -> dict[str, tuple[int, int]]:
    """Rows and columns of the weights of a layer."""
    q, kv = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    return {
        "qkv": (q + 2 * kv, layout.hidden),
        "o": (layout.hidden, q),
        "gate_up": (2 * layout.inner, layout.hidden),
        "down": (layout.hidden, layout.inner),
    }


def products(device: torch.device, scale: Scale, layout: Layout, bandwidth: float) -> Found:
    """A layer's products with their weights, each time with another copy: no cache holds them all; beside
    torch's, which may choose another order of additions for every number of rows.
    """
    found, sums = Found(), {rows: dict.fromkeys(LINEARS, 0.0) for rows in scale.rows}
    for name, (cols, features) in layout_products(layout).items():
        count = max(1, scale.copies // (2 * cols * features))
        weights = torch.randn((count, cols, features), device=device).to(torch.bfloat16).unbind(0)
        for rows in scale.rows:
            x = torch.randn((rows, features), device=device).to(torch.bfloat16)

            for op, product in LINEARS.items():

                def run(x: Tensor = x, weights: Weights = weights, product: Product = product) -> None:
                    for weight in weights:
                        product(x, weight)

                spread = time_recorded(run, device, scale.repeats, count)
                bound = weights[0].nbytes / bandwidth
                found.figures.append(micro(f"{op} {name} [{cols}, {features}], {rows} rows", spread, bound))
                sums[rows][op] += spread[1]
        if name == "gate_up":
            found.figures += gated(device, scale, weights, bandwidth)
    for rows, seconds in sums.items():
        ours, torchs = seconds.values()
        found.figures.append(
            Figure(f"ours over torch's, a layer's products, {rows} rows", ours / torchs, "x")
        )
    return found


def gated(
    device: torch.device, scale: Scale, weights: tuple[torch.Tensor, ...], bandwidth: float
) -> list[Figure]:
    """Gate, up and activation: alone, with the norm before it, and with that norm a launch of its own."""
    made = []
    features = weights[0].shape[1]
    for rows in (scale.rows[0], scale.rows[-1]):
        x, down = (torch.randn((n, features), device=device).to(torch.bfloat16) for n in (rows, features))
        stream, weight = linear_add(x, down, x), torch.ones_like(x[0])
        norms = {
            "": None,
            ", norm within": Norm(weight, 1e-5, squares=stream.squares),
            ", norm before": Norm(weight, 1e-5),
        }
        for name, norm in norms.items():

            def run(x: torch.Tensor = stream.x, norm: Norm | None = norm) -> None:
                for weight in weights:
                    gated_linear(x, weight, "silu", None, norm)

            spread = time_recorded(run, device, scale.repeats, len(weights))
            what = f"gated_linear{name}, {rows} row{'s' * (rows > 1)}"
            made.append(micro(what, spread, weights[0].nbytes / bandwidth))
    return made


def heads(device: torch.device, scale: Scale, layout: Layout, bandwidth: float) -> Found:
    """The head with its statistics and picks."""
    found = Found()
    weight = torch.randn((layout.vocab, layout.hidden), device=device).to(torch.bfloat16)
    for rows in scale.rows:
        x = torch.randn((rows, layout.hidden), device=device).to(torch.bfloat16)
        cold, key = torch.zeros(rows, device=device), torch.arange(rows, device=device)

        def run(x: torch.Tensor = x, cold: torch.Tensor = cold, key: torch.Tensor = key) -> None:
            lm_head(x, weight, layout.vocab, 0.0, cold, key, key, key)

        spread = time_recorded(run, device, scale.repeats)
        found.figures.append(micro(f"lm_head, {rows} rows", spread, weight.nbytes / bandwidth))
    return found


def attention(device: torch.device, scale: Scale, layout: Layout, bandwidth: float) -> Found:
    """Attention of all layers, each with a cache of its own, for one text and, up to the middle context,
    many.
    """
    found = Found()
    many = scale.batches[-1] // 4 or 1
    for index, context in enumerate(scale.contexts):
        for seqs, rows in ((1, 1), (1, 5), (many, 1))[: 3 if index < 2 else 2]:
            run, num_bytes = attend(device, layout, context, seqs, rows)
            spread = time_recorded(run, device, scale.repeats, layout.layers)
            what = f"paged_attention, {seqs} texts of {context}, {rows} rows each"
            found.figures.append(micro(what, spread, num_bytes / bandwidth))
    return found


def attend(
    device: torch.device, layout: Layout, context: int, seqs: int, rows: int
) -> tuple[Callable[[], None], int]:
    """All layers' attention, and the bytes of keys and values that one layer reads."""
    width = -(-context // BLOCK_SIZE)
    shape = (2 * layout.layers, seqs * width, BLOCK_SIZE, layout.kv_heads, layout.head_dim)
    caches = torch.randn(shape, device=device, dtype=torch.bfloat16)
    q = torch.randn((seqs * rows, layout.heads, layout.head_dim), device=device).to(torch.bfloat16)
    tables = torch.arange(seqs * width, dtype=torch.int32, device=device).view(seqs, width)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device) * rows
    lengths = torch.full((seqs,), context, dtype=torch.int32, device=device)

    def run() -> None:
        for k, v in caches.unflatten(0, (layout.layers, 2)).unbind(0):
            paged_attention(q, k, v, tables, starts, lengths, layout.head_dim**-0.5)

    return run, 2 * seqs * context * layout.kv_heads * layout.head_dim * 2
