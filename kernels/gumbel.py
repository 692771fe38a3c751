"""Sampling noise that is a function of (seed, position, token id) and of nothing else (Gumbel-max)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .op import Op

ROUNDS = 10
MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)  # of counter words 0 and 2
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the two key words before each round but the first
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., SC'11): the four 32-bit words [4, n] that `counter` encrypts to.

    counter: [4, n] uint64, each entry a 32-bit word, word 0 first; key: 64 bits, low word first.
    """
    even, odd = counter[0::2], counter[1::2]
    for i in range(ROUNDS):
        words = [(key >> 32 * j) + i * WEYL[j] & 0xFFFFFFFF for j in (0, 1)]
        product = even * MULTIPLIERS
        even = (product >> HALF)[::-1] ^ odd ^ np.array(words, dtype=np.uint64)[:, None]
        odd = (product & LOW)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


@Op
def gumbel_noise(seed: int, position: int, vocab: int) -> Tensor:
    """Standard Gumbel noise of one output position, one value per token id: [vocab] fp32, on the CPU.

    -log(-log(u)) in fp64, rounded to fp32 last, with u = (bits + 0.5) / 2^32 in (0, 1).  The bits of token t
    are word t % 4 of Philox4x32-10 of the counter (t // 4, position, 0, 0) under the key `seed` modulo 2^64,
    so a larger vocabulary extends a smaller one.  position: 0 <= position < 2^32.
    """
    counter = np.zeros((4, (vocab + 3) // 4), dtype=np.uint64)
    counter[0] = np.arange(counter.shape[1])
    counter[1] = position
    bits = philox4x32(counter, seed % 2**64).T.reshape(-1)[:vocab]
    noise = -np.log(-np.log((bits + 0.5) * 2.0**-32))
    return torch.from_numpy(noise.astype(np.float32))
