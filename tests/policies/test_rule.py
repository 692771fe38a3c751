"""One table of cases holds all twins of the writing rule: step, scoring, C++, replay, op and Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nudging import Base, Guide, Nudging
from nudging.kernels.draft_limits import LOOKAHEAD, WIDTH
from nudging.kernels.draft_verify import (
    BASE_EOS,
    GUIDE_EOS,
    RUNNING,
    STARTS_WITH_SPACE,
    STOP,
    draft_verify,
    replay,
)
from nudging.policies.rule import ALONE, Rule, rule_of
from tests.core.test_fast_path_core import PROMPT, Core, track
from tests.kernels.test_triton import on_device, pytestmark, triton
from tests.support.rule_cases import BASE_END, CASES, GUIDE_END, VOCAB, Case

__all__ = ["pytestmark"]

ROOM = 100
AUTHORS = {"b": "base", "g": "guide"}
MARKS = [STARTS_WITH_SPACE * (token % 2) for token in range(VOCAB)]
MARKS[BASE_END] |= BASE_EOS
MARKS[GUIDE_END] |= GUIDE_EOS

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class NoRow(Exception):
    """The case does not say."""


class CaseView:
    """The view of a text that has written `done` tokens of the case's path."""

    def __init__(self, case: Case, done: int) -> None:
        self._case, self._done = case, done

    def row(self, role: str) -> Any:
        rows = self._case.base if role == "base" else tuple((token, 1.0) for token in self._case.path)
        if self._done >= len(rows):
            raise NoRow
        token, prob = rows[self._done]
        return SimpleNamespace(token=token, top_token=token, top_prob=prob)

    def rollout(self, role: str, length: int) -> list[Any]:
        path = self._case.path[self._done :][:length]
        end = next((i + 1 for i, token in enumerate(path) if self.is_eos(role, token)), None)
        if end is None and len(path) < length:
            raise NoRow
        return [SimpleNamespace(token=token) for token in path[:end]]

    def is_eos(self, role: str, token: int) -> bool:
        return token == (BASE_END if role == "base" else GUIDE_END)

    def starts_with_space(self, token: int) -> bool:
        return token % 2 == 1


def policy_of(case: Case) -> Nudging:
    granularity = "word" if case.by_word else "token"
    return Nudging(case.threshold, granularity, "<=" if case.or_equal else "<")


def on_path(case: Case, tokens: list[int]) -> bool:
    return tokens == list(case.path[: len(tokens)])


@every_case
def test_the_policys_step_writes_the_case(case: Case) -> None:
    wrote: list[tuple[int, str]] = []
    ended = False
    while not ended and on_path(case, [token for token, _ in wrote]):
        try:
            step = policy_of(case).step(CaseView(case, len(wrote)), None)  # type: ignore[arg-type]
        except NoRow:
            break
        wrote += [(token, step.author[0]) for token in step.tokens]
        ended = step.finish == "stop"
    assert (tuple(wrote), ended) == (case.wrote, case.ends)


@every_case
def test_scoring_finds_the_same_owners(case: Case) -> None:
    """But for a word that is cut by an end: what is given need not end there."""
    policy, state, owners = policy_of(case), None, []
    for done, (token, _) in enumerate(case.wrote):
        owner, state = policy.owner(CaseView(case, done), state, token)  # type: ignore[arg-type]
        owners.append(owner)
        if case.ends:
            break
    assert owners == [AUTHORS[author] for _, author in case.wrote][: len(owners)]


def statistics_of(prob: float) -> tuple[float, float]:
    """A largest logit and a log-sum-exp that say this probability, exactly."""
    return 0.0, -math.log(prob) if prob else math.inf


@every_case
def test_the_replay_writes_the_case(case: Case) -> None:
    rows = [(*statistics_of(prob), token) for token, prob in case.base]
    how = case.threshold, case.or_equal, case.by_word, False, ROOM
    wrote, finish = replay(rows, list(case.path), MARKS, *how)
    assert tuple((token, "bg"[owner]) for token, owner in wrote) == case.wrote
    assert finish == (STOP if case.ends else RUNNING)


def arguments(cases: tuple[Case, ...]) -> tuple[torch.Tensor, ...]:
    """All cases as one batch of the op."""
    count = len(cases)
    top, lse = torch.zeros(count, 4), torch.zeros(count, 4)
    picks = torch.zeros(count, 4, dtype=torch.int32)
    path = torch.zeros(count, WIDTH, dtype=torch.int32)
    for s, case in enumerate(cases):
        for i, (token, prob) in enumerate(case.base):
            top[s, i], lse[s, i] = statistics_of(prob)
            picks[s, i] = token
        path[s, : len(case.path)] = torch.tensor(case.path[:WIDTH])
    return (
        top, lse, picks,
        torch.tensor([len(case.base) - 1 for case in cases], dtype=torch.int32),
        path,
        torch.tensor([len(case.path[:WIDTH]) for case in cases], dtype=torch.int32),
        torch.tensor([case.threshold for case in cases], dtype=torch.float64),
        torch.tensor([case.or_equal for case in cases]),
        torch.tensor([case.by_word for case in cases]),
        torch.zeros(count, dtype=torch.bool),
        torch.full((count,), ROOM, dtype=torch.int32),
        torch.tensor(MARKS, dtype=torch.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("twin", ["reference", "triton"])
def test_the_op_and_its_triton_twin_write_the_cases(twin: str) -> None:
    verify = draft_verify.reference if twin == "reference" else triton("draft_verify")
    found = verify(*on_device(arguments(CASES)))
    for s, case in enumerate(CASES):
        count = int(found.written[s])
        pairs = zip(found.tokens[s, :count].tolist(), found.owners[s, :count].tolist(), strict=True)
        assert tuple((token, "bg"[owner]) for token, owner in pairs) == case.wrote, case.name
        assert int(found.finish[s]) == (STOP if case.ends else RUNNING), case.name


@every_case
def test_cpp_writes_the_case_or_leaves_the_step_to_python(case: Case) -> None:
    """C++ hands a request back before a step that may end its text; what it wrote before is the case's."""
    begin, path = len(PROMPT), list(case.path)
    guide_rows = [(begin + i, token, token, 1.0) for i, token in enumerate(path)]
    base_rows = [(begin + i, token, token, prob) for i, (token, prob) in enumerate(case.base)]
    # The first row comes from a pass; those behind it are drafts that are there.
    asked = 0 if case.base else 1
    (_, token, _, prob), *rest = base_rows or guide_rows
    base_rows, guide_rows = (rest, guide_rows) if case.base else ([], rest)
    known = {"begin": begin - 1, "tokens": [PROMPT[-1], *path]}
    blocks = {"blocks": list(range(1, 14)), "registered": 0}
    base = track(0, ends=[BASE_END], rows=base_rows, **known, **blocks)
    guide = track(1, ends=[GUIDE_END], rows=guide_rows, **known, **blocks)
    rule = policy_of(case).rule
    assert rule is not None
    numbers = (2 if case.by_word else 1, rule.threshold, rule.or_equal, rule.lookahead)
    core = Core(blocks=60)
    core.enter(numbers, [base, guide], need=(asked, begin, begin, 0, False))
    core.passes(asked, (token, prob))
    tokens, authors = core.fast_path.take_written(0)
    wrote = tuple((token, "bg"[author]) for token, author in zip(tokens, authors, strict=True))
    assert wrote == (() if case.ends else case.wrote)


def test_rules_are_what_the_policies_say() -> None:
    assert rule_of(Base()) == rule_of(Guide()) == ALONE
    assert rule_of(Nudging()) == Rule("word", 0.4, False, LOOKAHEAD)
    assert rule_of(Nudging(0.3, "token", "<=")) == Rule("token", 0.3, True, 0)
    assert rule_of(Nudging(granularity="reference")) is None


def test_a_subclass_has_a_rule_only_where_it_declares_one() -> None:
    @dataclass(frozen=True)
    class Otherwise(Base):
        """It may write anything."""

    @dataclass(frozen=True)
    class AsBefore(Base):
        rule = ALONE

    assert rule_of(Otherwise()) is None
    assert rule_of(AsBefore()) == ALONE
    assert rule_of(object()) is None
