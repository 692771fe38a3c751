"""The rows of the embedding table: where the residual stream begins."""

from torch import Tensor

from .cuda import on_cuda
from .linear_add import Stream
from .op import Op
from .weight import PackedWeight, look_up


@Op
def embed(weight: Tensor | PackedWeight, ids: Tensor, scale: float = 1.0) -> Stream:
    """weight[ids] * scale, rounded to the weight's dtype: a Stream [rows, dim].

    weight: [vocab, dim], packed or not; ids: int32 or int64, [rows] or [seqs, rows of each], anywhere.
    """
    x = look_up(weight, ids.flatten())
    return Stream(x * scale if scale != 1.0 else x, None)


embed.impl_at(
    "triton",
    runs_on=lambda weight, *_, **__: isinstance(weight, Tensor) and on_cuda(weight),
    at="nudging.kernels.gpu.embed:embed",
)
