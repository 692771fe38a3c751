"""Noise, filters and draws: known answers, transformers' warpers, frequencies."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nudging.kernels.gumbel import gumbel_noise, philox4x32
from nudging.kernels.sample import pick, warp

# Counter, key and answer in Random123's known-answer file, words in order.
PHILOX_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def random_logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    """Normal logits [rows, vocab] fp32."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    words = np.array([[int(word, 16)] for word in counter.split()], dtype=np.uint64)
    assert [f"{word:08x}" for word in philox4x32(words, high << 32 | low)[:, 0]] == answer.split()


def test_noise_is_the_gumbel_transform_of_the_keyed_bits() -> None:
    seed, position = 0xFFFF_FFFF_0000_0007, 12345
    noise = gumbel_noise(seed, position, 131072)
    # The extremes show the half that is added to the bits.
    for token in [*range(11), int(noise.argmax()), int(noise.argmin())]:
        counter = np.array([[token // 4], [position], [0], [0]], dtype=np.uint64)
        bits = int(philox4x32(counter, seed)[token % 4, 0])
        exact = -math.log(-math.log((bits + 0.5) / 2**32))
        assert float(noise[token]) == pytest.approx(exact, rel=1e-7)  # fp32 rounds within 6e-8


@pytest.mark.parametrize("vocab", [1, 4, 5, 1023, 4099])
def test_a_larger_vocabulary_extends_a_smaller_one(vocab: int) -> None:
    noise = gumbel_noise(7, 3, vocab)
    assert noise.shape == (vocab,)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, gumbel_noise(7, 3, 8192)[:vocab])


def test_noise_differs_between_positions_and_between_the_words_of_a_seed() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1 << 32, 0), (-1, 0)]
    noise = [gumbel_noise(seed, position, 64) for seed, position in keys]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))


def test_noise_has_the_moments_of_a_gumbel() -> None:
    noise = torch.cat([gumbel_noise(11, position, 4096) for position in range(50)]).double()
    deviation = math.pi / math.sqrt(6 * len(noise))  # of the sample mean
    assert abs(noise.mean().item() - 0.5772156649) < 4 * deviation
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


GRID = list(itertools.product([0.3, 1.0, 1.7], [0, 1, 7, 5000], [0.05, 0.8, 0.99, 1.0], [0.0, 0.1, 1.0]))


@pytest.mark.parametrize("vocab", [1, 7, 1025])
def test_warp_agrees_with_the_warpers_of_transformers(vocab: int) -> None:
    logits = random_logits(5, vocab, seed=vocab)
    for temperature, top_k, top_p, min_p in GRID:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        expected = torch.log_softmax(warpers(torch.empty(5, 0, dtype=torch.long), logits), dim=-1)
        # fp32 against fp64 inside: a few ulps of a log-probability of some tens.
        torch.testing.assert_close(
            warp(logits, temperature, top_k, top_p, min_p), expected, rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (40, 1.0, 0.0), (9, 0.9, 0.02)])
def test_a_row_is_warped_alike_alone_and_in_a_batch(top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(16, 4099, seed=2)
    together = warp(logits, 0.7, top_k, top_p, min_p)
    for i in range(16):
        assert torch.equal(together[i], warp(logits[i : i + 1], 0.7, top_k, top_p, min_p)[0])
    assert torch.equal(together[3:8], warp(logits[3:8], 0.7, top_k, top_p, min_p))


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.4)])
def test_ties_at_the_boundary_keep_the_lowest_ids(top_k: int, top_p: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    kept = warp(logits, 1.0, top_k, top_p, 0.0)[0] > -math.inf
    assert kept.tolist() == [False, True, True, False, False, False]


def test_many_ties_keep_the_lowest_ids_too() -> None:
    logits = random_logits(1, 4099, seed=8, scale=1.0).round()
    expected = sorted(range(4099), key=lambda token: (-logits[0, token].item(), token))[:1500]
    kept = warp(logits, 1.0, 1500, 1.0, 0.0)[0] > -math.inf
    assert kept.nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(1, 1.0, 0.0), (0, 1e-9, 0.0), (0, 1.0, 1.0)])
def test_the_likeliest_token_always_stays(top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(3, 100, seed=9)
    kept = warp(logits, 1.0, top_k, top_p, min_p)
    assert torch.equal(kept.argmax(dim=-1), logits.argmax(dim=-1))
    assert (kept > -math.inf).sum(dim=-1).tolist() == [1, 1, 1]


def test_a_banned_token_stays_banned() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    for top_k, top_p in [(0, 1.0), (4, 1.0), (0, 0.999), (3, 0.999)]:
        assert torch.isneginf(warp(logits, 0.5, top_k, top_p, 0.0))[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.5, 6, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.3, 9, 0.95, 0.05)],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_have_the_frequencies_of_warp(
    temperature: float, top_k: int, top_p: float, min_p: float, vary: str
) -> None:
    vocab, draws = 12, 4000
    logits = random_logits(1, vocab, seed=5, scale=1.2)[0]
    counts = torch.zeros(vocab)
    for i in range(draws):
        seed, position = (77, i) if vary == "position" else (i, 77)
        counts[pick(logits, temperature, top_k, top_p, min_p, seed, position)] += 1
    expected = warp(logits[None], temperature, top_k, top_p, min_p)[0].exp() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_pick_is_greedy_at_temperature_zero_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 2.0])
    assert {pick(logits, 0.0, 3, 0.5, 0.1, seed, seed) for seed in range(20)} == {1}


def test_pick_nears_greedy_as_the_temperature_falls() -> None:
    logits = random_logits(1, 50, seed=3)[0]
    assert {pick(logits, 1e-6, 0, 1.0, 0.0, seed, 0) for seed in range(50)} == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [2.0**-17, 1e-10, 1e-45, 1e-308, 5e-324])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.5, 0.0), (4, 5e-324, 5e-324)])
def test_no_temperature_is_too_small(temperature: float, filters: tuple[int, float, float]) -> None:
    """Noise over temperature overflows; the likeliest token is picked all the same."""
    for scale in (3.0, 1e30):
        logits = random_logits(1, 50, seed=3, scale=scale)[0]
        for seed in range(5):
            assert pick(logits, temperature, *filters, seed, 7) == int(logits.argmax())
