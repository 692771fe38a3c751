"""Mixtures of logits: the reference against the formulas it names, and Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nudging.kernels.mix_logits import mix_logits
from tests.kernels.test_triton import on_device, pytestmark, triton
from tests.support.cases import Args, noise
from tests.support.compare import assert_same_bits

__all__ = ["pytestmark"]


def mix_args(roles: int, vocab: int, probabilities: bool) -> Args:
    """Nuclei of all tokens, of half, of one; ties, roles of weight 0, tokens that one of them rules out."""
    rows, randn = 8, noise(roles)
    logits = randn(roles, rows, vocab) * 3
    logits[:, :, 2::5] = logits[:, :, 2:3]
    logits[0, 3] = 1.0
    logits[1, 4, ::3] = -math.inf
    logits[1, 7] = math.nan
    weights = randn(roles, rows)
    weights[1, 6:] = 0.0
    if probabilities:
        weights = weights.abs() / weights.abs().sum(0)
    p = torch.tensor([1.0, 0.9, 0.5, 0.317, 0.7, 0.0, 0.999, 0.2])
    return logits, weights, probabilities, 0, p, randn(rows).abs() + 0.2


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def mixed(logits: Tensor, weights: list[float], probabilities: bool = False, p: float = 1.0) -> Tensor:
    return mix_logits(logits, torch.tensor(weights)[:, None], probabilities, 0, row(p)[0], row(1.0)[0])


def test_the_worked_examples() -> None:
    dera = mixed(torch.stack([row(2.0, 0.0), row(0.0, 0.0)]), [2.0, -1.0])
    assert torch.softmax(dera, 1)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-4)))
    principle = mixed(torch.stack([row(1.0, 0.0), row(0.0, 0.0)]), [3.0, -2.0])
    assert principle.tolist() == [[3.0, 0.0]]
    guide, base = row(0.7, 0.2, 0.1).log(), row(0.1, 0.3, 0.6).log()
    blend = mixed(torch.stack([base, guide]), [0.25, 0.75], probabilities=True)
    torch.testing.assert_close(blend.exp(), row(0.55, 0.225, 0.225))
    assert mixed(torch.stack([base, guide]), [0.0, 1.0], p=0.7).isfinite().tolist() == [[False, True, True]]


def test_logits_and_their_logs_of_probabilities_mix_to_one_distribution() -> None:
    logits = noise(0)(3, 1, 50)
    plain = mixed(logits, [1.0, 0.5, -0.5])
    normalised = mixed(torch.log_softmax(logits, -1), [1.0, 0.5, -0.5])
    torch.testing.assert_close(torch.softmax(plain, 1), torch.softmax(normalised, 1))
    assert_same_bits([mixed(logits, [1.0, 0.0, 0.0])], [logits[0]])


@pytest.mark.parametrize("probabilities", [False, True], ids=["logits", "probabilities"])
@pytest.mark.parametrize(("roles", "vocab"), [(2, 1300), (3, 70)])
def test_triton_mixes_as_the_reference(roles: int, vocab: int, probabilities: bool) -> None:
    args = mix_args(roles, vocab, probabilities)
    want = mix_logits.reference(*args)
    got = triton("mix_logits")(*on_device(args)).cpu()
    assert torch.equal(got == -math.inf, want == -math.inf)
    if probabilities:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    else:
        assert_same_bits([got], [want])
    for i in (0, 4):
        alone = [one[..., i : i + 1, :] if one is args[0] else one[..., i : i + 1] for one in args[:2]]
        alone_p = (one[i : i + 1] for one in args[4:])
        one = triton("mix_logits")(*on_device((*alone, probabilities, 0, *alone_p))).cpu()
        assert_same_bits([one], [got], slice(i, i + 1))


def test_a_role_that_is_not_there_is_refused() -> None:
    logits, weights, kind, _, *rest = on_device(mix_args(2, 70, False))
    with pytest.raises(ValueError, match="nucleus_role is 2; there are roles 0 to 1"):
        triton("mix_logits")(logits, weights, kind, 2, *rest)
