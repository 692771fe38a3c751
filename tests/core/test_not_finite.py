"""Logits that are not finite end the request that asked for them, on every path, and nobody else's."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nudging import Base, Guide, NumericalError, SamplingParams
from nudging.core.request import Request
from nudging.core.rows import Row
from nudging.core.wanted import GREEDY, Wanted
from nudging.executor.cuda_graphs import is_picked_by_head
from nudging.executor.sampler import decide
from nudging.policies import Nudging, Policy
from nudging.text.prompts import RolePrompt
from tests.support.fake import fake_engine

WRONG = {
    "nan": [math.nan],
    "one inf": [math.inf],
    "two infs": [math.inf, math.inf],
    "inf and nan": [math.inf, math.nan],
    "half at its end": [float(torch.tensor(70000.0).half())],
}


def row_with(values: list[float], vocab: int = 32) -> Tensor:
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    row[5 : 5 + len(values)] = torch.tensor(values)
    return row


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", [*WRONG, "nothing"])
def test_a_row_that_is_not_finite_is_an_error_and_no_token(how: str, temperature: float) -> None:
    bad = torch.full((32,), -math.inf) if how == "nothing" else row_with(WRONG[how])
    params = SamplingParams(temperature=temperature, seed=1, top_p=0.9, top_k=7, min_p=0.01)
    rows = decide(torch.stack([row_with([]), bad]), [Wanted(params, 1, 0, 32, False)] * 2)
    assert isinstance(rows[0], Row)
    assert isinstance(rows[1], NumericalError)
    assert isinstance(decide(bad[None], [Wanted(GREEDY, 0, 0, 32, True)])[0], NumericalError)


def test_single_tokens_that_are_excluded_by_the_model_are_fine() -> None:
    for params in (GREEDY, SamplingParams(temperature=1.0, seed=3, top_p=0.5)):
        [row] = decide(row_with([-math.inf] * 9)[None], [Wanted(params, 3, 0, 32, False)])
        assert isinstance(row, Row)
        assert row.token not in range(5, 14)


def model_that_breaks(at: int, values: list[float]) -> Callable[[list[int]], Tensor]:
    """A row for every prefix; behind `at` tokens that begin with 9 it is a wrong one."""

    def logits(ids: list[int]) -> Tensor:
        row = torch.randn(32, generator=torch.Generator().manual_seed(sum(ids) + 31 * len(ids)))
        if ids[0] == 9 and len(ids) == at:
            row[: len(values)] = torch.tensor(values)
        return row

    return logits


@pytest.mark.parametrize("carries", [True, False], ids=["C++", "Python"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("policy", [Base(), Guide(), Nudging(0.4, "token")], ids=str)
def test_the_engine_writes_up_to_the_row_that_is_not_finite(
    policy: Policy, how: str, temperature: float, carries: bool
) -> None:
    models = {name: model_that_breaks(12, WRONG[how]) for name in ("base", "guide")}
    engine, roles = fake_engine(models, carries=carries)
    requests = []
    for i, first in enumerate((9, 8)):
        prompts = {name: RolePrompt([first, 1, 2]) for name in policy.roles}
        params = SamplingParams(max_tokens=20, temperature=temperature, seed=4)
        requests.append(Request(str(i), policy, params, 4, prompts, roles, 3))
        engine.add(requests[-1])
    for _ in range(200):
        if engine.has_work:
            engine.step()
    broken, fine = requests
    assert isinstance(broken.error, NumericalError)
    assert len(broken.output) == 9, "the tokens before it are good"
    assert fine.error is None
    assert len(fine.output) == 20


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1},
        {"bad_words": "a"}, {"allowed_token_ids": [1]}, {"logit_bias": {1: 1.0}},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_logits_is_picked_where_they_are_written(params: dict[str, object]) -> None:
    """No recording, no cycle and nothing of C++ but for biases."""
    bent = SamplingParams(**params)  # type: ignore[arg-type]
    assert not bent.is_greedy
    assert not is_picked_by_head(Wanted(bent, 0, 0, 32, False))
    assert is_picked_by_head(Wanted(SamplingParams(), 0, 0, 32, False))
    assert bent.chooses_tokens == ("logit_bias" not in params)
