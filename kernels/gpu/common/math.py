"""Device functions that more than one kernel needs.

Every kernel is launched with `enable_fp_fusion=False`: what the compiler may contract to a fused multiply-add
would else depend on the kernel around it, and a fused op would not have the bits of the ops that it fuses.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of fp32, to a few ulps: a polynomial (Cephes, tanhf) below 0.625, an exponential above."""
    size = tl.abs(x)
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = x + x * z * (p - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def cap_logits(x, cap):
    """cap * tanh(x / cap) of fp32."""
    return cap * tanh(x / cap)


@triton.jit
def total(x, SIZE: tl.constexpr):
    """The sum of a vector of SIZE fp32, a power of two: neighbours are added, then neighbouring sums.

    Unlike that of tl.sum, this order is the same for every layout, so for every kernel and number of warps.
    """
    for _ in tl.static_range(SIZE.bit_length() - 1):
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1)
    return tl.sum(x, 0)


@triton.jit
def inverse_root(y, dim, eps, BLOCK: tl.constexpr):
    """1 / sqrt(mean(y^2) + eps) of one row; y: BLOCK elements of fp32, zero past `dim`."""
    return tl.rsqrt(total(y * y, BLOCK) / dim + eps)


@triton.jit
def rms_normed(y, weight, dim, eps, UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """One row's y / sqrt(mean(y^2) + eps) * w; y, weight: BLOCK elements of fp32, y zero past `dim`."""
    scale = weight + 1.0 if UNIT_OFFSET else weight
    return y * inverse_root(y, dim, eps, BLOCK) * scale


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name, "silu", "gelu" (erf) or "gelu_tanh", of fp32."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return y
