"""The replay of Nudging over drafts writes what the straight-line oracle writes, on every device."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nudging.kernels.draft_limits import MAX_DRAFT, WIDTH
from nudging.kernels.draft_verify import (
    BASE_EOS,
    GUIDE_EOS,
    LENGTH,
    RUNNING,
    STARTS_WITH_SPACE,
    Verified,
    draft_verify,
)
from nudging.kernels.softmax_stats import softmax_stats
from tests.kernels.test_triton import on_device, pytestmark, triton
from tests.support.cases import Args
from tests.support.oracle import Gate, Params, Role, Written, choose, nudging_token, nudging_word

__all__ = ["pytestmark"]

VOCAB = 14
SPACES = frozenset({2, 3, 4, 5, 6})
MARKS = torch.tensor([STARTS_WITH_SPACE * (token in SPACES) for token in range(VOCAB)], dtype=torch.uint8)


@dataclasses.dataclass(frozen=True)
class Job:
    """A pair of random models that often agree, and a request to them."""

    seed: int
    threshold: float
    comparator: str
    word: bool
    params: Params

    @functools.cached_property
    def roles(self) -> tuple[Role, Role]:
        def model(name: int, eos: frozenset[int]) -> Role:
            @functools.cache
            def logits(ids: tuple[int, ...]) -> Tensor:
                def randn(*key: int) -> Tensor:
                    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(key) % 2**31))

                row = 2.2 * randn(self.seed, *ids) + 0.8 * randn(self.seed, name, *ids)
                row[list(eos)] -= 4
                return row

            return Role(lambda ids: logits(tuple(ids)), [self.seed], eos)

        return model(1, frozenset({0, 7})), model(2, frozenset({1, 7}))

    def oracle(self) -> Written:
        gate = Gate(self.threshold, self.comparator)
        if self.word:
            return nudging_word(*self.roles, self.params, gate, SPACES.__contains__)
        return nudging_token(*self.roles, self.params, gate)


def make_job(seed: int) -> Job:
    rng = random.Random(seed)
    threshold = rng.choice([0.0, 0.3, 0.5, 0.7, 1.0, 1.5])
    warm, ignore = rng.choice([0.0, 0.0, 0.8]), rng.random() < 0.2
    params = Params(rng.choice([1, 7, 40, 40]), warm, seed=seed, ignore_eos=ignore)
    return Job(seed, threshold, rng.choice(["<", "<="]), rng.random() < 0.6, params)


def rows_of(job: Job, ids: list[int], rng: random.Random) -> tuple[Tensor, ...]:
    """What the models say of the guide's continuation of `ids`, as much as a round happened to compute."""
    base, guide = job.roles
    path: list[int] = []
    while len(path) < WIDTH and not (path and job.params.is_eos(path[-1], guide.eos)):
        path.append(choose(guide.row(ids + path), job.params, len(ids) + len(path)))
    drafted = rng.randint(0, min(MAX_DRAFT, len(path)))
    # Without the base's rows nothing can be verified, but a threshold above 1 does not ask for them.
    drafted = -1 if job.threshold > 1 else drafted
    logits = [base.row(ids + path[:i]) for i in range(drafted + 1)]
    stats = softmax_stats(torch.stack(logits)) if logits else None
    top, lse = torch.full((2, MAX_DRAFT + 1), float("nan"))
    token = torch.full((MAX_DRAFT + 1,), 2**31 - 1, dtype=torch.int32)
    if stats is not None:
        top[: drafted + 1], lse[: drafted + 1] = stats.max, stats.lse
        picks = [choose(row, job.params, len(ids) + i) for i, row in enumerate(logits)]
        token[: drafted + 1] = torch.tensor(picks)
    guide_token = torch.full((WIDTH,), 2**31 - 1, dtype=torch.int32)
    guide_token[: len(path)] = torch.tensor(path)
    return top, lse, token, torch.tensor(drafted).int(), guide_token, torch.tensor(len(path)).int()


def arguments(jobs: list[Job], texts: list[list[int]], rng: random.Random) -> Args:
    computed = [rows_of(job, ids, rng) for job, ids in zip(jobs, texts, strict=True)]
    base, guide = jobs[0].roles
    marks = MARKS.clone()
    for role, bit in ((base, BASE_EOS), (guide, GUIDE_EOS)):
        marks[list(role.eos)] |= bit
    return (
        *(torch.stack(column) for column in zip(*computed, strict=True)),
        torch.tensor([job.threshold for job in jobs], dtype=torch.float64),
        torch.tensor([job.comparator == "<=" for job in jobs]),
        torch.tensor([job.word for job in jobs]),
        torch.tensor([job.params.ignore_eos for job in jobs]),
        torch.tensor([job.params.max_tokens - len(ids) for job, ids in zip(jobs, texts, strict=True)]).int(),
        marks,
    )


def written(jobs: list[Job], verify: Callable[..., Verified]) -> list[Written]:
    """The texts of all jobs, batched, with drafts of random lengths."""
    rng = random.Random(0)
    out = [Written([], [], "") for _ in jobs]
    while open_ := [i for i, one in enumerate(out) if not one.finish_reason]:
        some = [jobs[i] for i in open_]
        found = verify(*arguments(some, [out[i].token_ids for i in open_], rng))
        for row, i in enumerate(open_):
            count, finish = int(found.written[row]), int(found.finish[row])
            assert count > 0 or finish != RUNNING
            ids = found.tokens[row, :count].tolist()
            assert int(found.last[row]) == (ids[-1] if ids else -1)
            assert bool((found.tokens[row, count:] == -1).all() and (found.owners[row, count:] == -1).all())
            authors = ["guide" if owner else "base" for owner in found.owners[row, :count].tolist()]
            reason = {RUNNING: "", LENGTH: "length"}.get(finish, "stop")
            out[i] = Written(out[i].token_ids + ids, out[i].authors + authors, reason)
    return out


JOBS = [make_job(seed) for seed in range(60)]


def test_the_jobs_see_both_authors_and_both_ends() -> None:
    """Guards the guards below."""
    texts = [job.oracle() for job in JOBS]
    assert {text.finish_reason for text in texts} == {"stop", "length"}
    assert sum({"base", "guide"} == set(text.authors) for text in texts) > 15


def test_replayed_drafts_are_the_oracles_text() -> None:
    assert written(JOBS, draft_verify.reference) == [job.oracle() for job in JOBS]


def test_triton_replays_as_the_reference() -> None:
    def verify(*args: Any) -> Verified:
        want = draft_verify.reference(*args)
        got = Verified(*(one.cpu() for one in triton("draft_verify")(*on_device(args))))
        for name, one, other in zip(Verified._fields, got, want, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name
        # What is not known need not be there.
        rows, path = int(args[3].max()) + 1, int(args[5].max())
        narrow = (
            [one[:, : max(rows, 1)] for one in args[:3]]
            + [
                args[3],
                args[4].T.contiguous().T[:, : max(path, 1)],  # wherever it lies
                *args[5:],
            ]
        )
        for one, other in zip(triton("draft_verify")(*on_device(tuple(narrow))), want, strict=True):
            assert torch.equal(one.cpu(), other)
        return got

    written(JOBS[:24], verify)


def test_without_room_or_rows_nothing_is_written() -> None:
    args = list(arguments([JOBS[0]] * 2, [[], []], random.Random(1)))
    args[5], args[10] = torch.tensor([0, 0]).int(), torch.tensor([0, 5]).int()
    args[6][:] = 1.5
    for verify in (draft_verify.reference, triton("draft_verify")):
        found = verify(*on_device(tuple(args)))
        assert found.finish.tolist() == [LENGTH, RUNNING]
        assert found.written.tolist() == found.accepted.tolist() == [0, 0]


def test_what_does_not_fit_is_refused_by_name() -> None:
    args = list(on_device(arguments([JOBS[0]], [[]], random.Random(1))))
    args[4] = args[4].repeat(1, 2)
    with pytest.raises(ValueError, match=r"draft_verify: guide_token is \(1, 62\)"):
        triton("draft_verify")(*args)
