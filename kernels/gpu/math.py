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
def rms_normed(y, weight, dim, eps, UNIT_OFFSET: tl.constexpr):
    """One row's y / sqrt(mean(y^2) + eps) * w; y, weight: fp32 blocks, y zero past `dim`."""
    scale = weight + 1.0 if UNIT_OFFSET else weight
    return y * tl.rsqrt(tl.sum(y * y, 0) / dim + eps) * scale
