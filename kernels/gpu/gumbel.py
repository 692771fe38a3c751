"""Sampling noise on a GPU: the bits of `kernels/gumbel.py`, its logarithms in fp32.

The noise of a token is one function of (seed, position, token) in every kernel.  It is within
2^-21 * max(1, |noise|) of the reference, which computes in fp64.
"""

import triton
import triton.language as tl

from nudging.kernels.sample import COLD as COLD_TEMPERATURE

COLD = tl.constexpr(COLD_TEMPERATURE)


@triton.jit
def gumbel_of(bits):
    """-log(-log(u)), u = (bits + 0.5) / 2^32, of uint32 bits.

    Near 1, u is given by what it lacks of 1, and the rounding of 1 - v is divided out (Kahan).
    """
    u = (bits.to(tl.float32) + 0.5) * 0.00000000023283064365386962890625
    v = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 0.00000000023283064365386962890625
    upper = bits >= 0x80000000
    w = tl.where(upper, 1.0 - v, u)
    lacks = 1.0 - w
    log = tl.log(w)
    exact = tl.where(lacks == 0, -v, log * tl.div_rn(v, tl.where(lacks == 0, 1.0, lacks)))
    return -tl.log(-tl.where(upper, exact, log))


@triton.jit
def part_noise(seed, position, part, LEVELS: tl.constexpr):
    """[a, 1 << LEVELS] fp32: for each seed and position [a] int64 the noise of the tokens of a part [a]."""
    quads = (part[:, None] << (LEVELS - 2)) + tl.arange(0, 1 << (LEVELS - 2))[None, :]
    zero = quads.to(tl.uint32) * 0
    at = zero + position.to(tl.uint32)[:, None]
    a, b, c, d = tl.philox(seed[:, None], quads.to(tl.uint32), at, zero, zero)
    return gumbel_of(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit
def scores(logits, temperature, seed, position, part, LEVELS: tl.constexpr):
    """What a pick is the argmax of: logits / temperature + noise, or logits where the temperature is below
    COLD: of the others no quotient of fp32 logits up to 2^111 overflows.

    logits: [a, 1 << LEVELS] fp32, each row a part of a vocabulary; temperature, seed, position, part: [a].
    """
    warm = temperature >= COLD
    if tl.max(warm.to(tl.int32), 0) > 0:
        divided = tl.div_rn(logits, tl.where(warm, temperature, 1.0)[:, None])
        logits = tl.where(warm[:, None], divided + part_noise(seed, position, part, LEVELS), logits)
    return logits
