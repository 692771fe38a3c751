"""The ranking of a row's tokens without a sort: by the digits of their logits, taken as integers."""

import triton
import triton.language as tl


@triton.jit
def rank_key(x):
    """uint32 in the order of fp32 numbers; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def loaded(logits_ptr, start, vocab, BLOCK: tl.constexpr):
    """BLOCK ids and their logits, -inf past the vocabulary."""
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def top_and_mass(logits_ptr, vocab, temperature, BLOCK: tl.constexpr):
    """A row's largest logit, and the sum of exp((logit - largest) / temperature)."""
    top, total = float("-inf"), 0.0
    for start in range(0, vocab, BLOCK):
        _, x = loaded(logits_ptr, start, vocab, BLOCK)
        larger = tl.maximum(top, tl.max(x, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp((top - base) / temperature) + tl.sum(tl.exp((x - base) / temperature), 0)
        top = larger
    return top, total


@triton.jit
def last_key(
    logits_ptr, vocab, top, temperature, wanted,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """The largest key so that the tokens from it upwards are at least `wanted`, by number or by mass."""
    found = tl.full((), 0, tl.uint32)
    digits = tl.arange(0, 1 << DIGIT).to(tl.uint32)
    for step in range(32 // DIGIT):
        low = found + (digits << (32 - DIGIT * (step + 1)))
        held = tl.zeros([1 << DIGIT], tl.float32)
        for start in range(0, vocab, BLOCK):
            ids, x = loaded(logits_ptr, start, vocab, BLOCK)
            weight = tl.exp((x - top) / temperature) if BY_MASS else (ids < vocab).to(tl.float32)
            held += tl.sum(tl.where(rank_key(x)[None, :] >= low[:, None], weight[None, :], 0.0), 1)
        found = tl.max(tl.where(held >= wanted, low, found), 0)
    return found


@triton.jit
def above(logits_ptr, vocab, top, temperature, key, BLOCK: tl.constexpr):
    """The number and the mass of the tokens of larger keys, and one token's mass at this key."""
    count, mass, one = 0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        _, x = loaded(logits_ptr, start, vocab, BLOCK)
        weight = tl.exp((x - top) / temperature)
        larger = rank_key(x) > key
        count += tl.sum(larger.to(tl.int32), 0)
        mass += tl.sum(tl.where(larger, weight, 0.0), 0)
        one = tl.maximum(one, tl.max(tl.where(rank_key(x) == key, weight, 0.0), 0))
    return count, mass, one
