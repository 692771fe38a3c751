"""Every way a text can end, at every offset of a cycle of drafts: inside, at the bonus token, behind it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nudging import Base, Nudging, SamplingParams
from nudging.core.request import Request
from nudging.policies import Policy
from nudging.text.prompts import RolePrompt
from nudging.text.roles import Role
from tests.support import oracle
from tests.support.fake import FixedCosts, TableTokenizer, fake_engine
from tests.support.pairs import as_oracle_params

VOCAB, LENGTH = 48, 20
EOS, STOP, ASK, SHOUT = 1, 2, 5, 6
KINDS = ("base ends", "guide ends", "both would end", "stop id", "stop string", "length")
TOKENIZER = TableTokenizer(
    [b"", b"", b"#", b"-", b"_", b"?", b"!", b"."] + [b" x" if i % 3 == 0 else b"y" for i in range(8, VOCAB)]
)
Arm = tuple[str, int | None]  # who drafts, and how many tokens; None as many as pay
ARMS: list[Arm] = [(drafter, k) for drafter in ("guide", "ngram") for k in (*range(1, 9), None)]
SOME_ARMS: list[Arm] = [
    ("guide", 1), ("ngram", 2), ("guide", 3), ("ngram", 4), ("guide", 8), ("ngram", 7), ("guide", None),
    ("ngram", None),
]  # fmt: skip


def script(role: str) -> Callable[[list[int]], Tensor]:
    """A role whose text goes round in five tokens, but for every sixth, which all the text before decides;
    the prompt says what happens, and where.
    """

    def row(ids: list[int]) -> Tensor:
        kind, end, at = KINDS[ids[0]], ids[1], len(ids) - 3
        sure, agrees = at % 7 != 5, at % 4 != 3 or at == end
        turn = at if at % 6 else sum(i * token for i, token in enumerate(ids))
        token = 8 + turn % 5 + (0 if role == "base" or agrees else 20)
        if kind == "stop string" and end - 1 <= at <= end:
            token = (ASK, SHOUT)[at - end + 1]
        if at == end and kind != "length":
            sure = sure if kind.startswith("stop") else kind != "guide ends"
            if kind == "stop id":
                token = STOP
            elif kind == "both would end" or kind == f"{role} ends":
                token = EOS
        logits = torch.zeros(VOCAB)
        prob = 0.9 if sure or role == "guide" else 0.25
        logits[token] = math.log(prob / (1 - prob) * (VOCAB - 1))
        return logits

    return row


Job = tuple[list[int], SamplingParams, Policy]


def all_jobs() -> list[Job]:
    """Each kind of end at each of the first LENGTH positions, greedy and sampled, under each policy."""
    return [
        (
            [number, end, 3],
            SamplingParams(
                max_tokens=max(end, 1) if kind == "length" else LENGTH,
                temperature=temperature,
                seed=end,
                stop=("?!",),
                stop_token_ids=(STOP,),
            ),
            policy,
        )
        for number, kind in enumerate(KINDS)
        for end in range(LENGTH)
        for temperature in (0.0, 0.7)
        for policy in (Base(), Nudging(0.4, "token"), Nudging(0.4, "word"))
    ]


def expected(job: Job) -> tuple[oracle.Written, str]:
    prompt, sampling, policy = job
    params, eos = as_oracle_params(sampling), frozenset({EOS})
    base, guide = (oracle.Role(script(name), prompt, eos) for name in ("base", "guide"))
    if isinstance(policy, Base):
        written = oracle.base(base, params)
    elif policy == Nudging(0.4, "token"):
        written = oracle.nudging_token(base, guide, params, oracle.Gate())
    else:
        written = oracle.nudging_word(base, guide, params, oracle.Gate(), TOKENIZER.starts_with_space)
    ended = oracle.end_at_stop(written, sampling.stop, TOKENIZER.text_of)
    return ended, oracle.cut_at_stop(TOKENIZER.text_of(ended.token_ids), sampling.stop)[0]


def check(jobs: Sequence[Job], wanted: Sequence[tuple[oracle.Written, str]], arms: Sequence[Arm]) -> None:
    """All jobs in one batch, neighbours in unlike arms."""
    costs = {"base": FixedCosts(1.0, 0.01), "guide": FixedCosts(0.1)}
    models = {name: script(name) for name in ("base", "guide")}
    engine, fakes = fake_engine(models, costs, num_blocks=40_000, vocab=VOCAB)
    roles: dict[str, Role] = {
        name: replace(role, eos_ids=frozenset({EOS}), tokenizer=TOKENIZER) for name, role in fakes.items()
    }
    requests = []
    for number, ((prompt, params, policy), (drafter, k)) in enumerate(zip(jobs, itertools.cycle(arms))):
        prompts = {name: RolePrompt(list(prompt)) for name in roles}
        seed = params.seed or 0
        requests.append(Request(f"{number}", policy, params, seed, prompts, roles, k, drafter=drafter))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    for request, job, want in zip(requests, jobs, wanted, strict=True):
        assert request.error is None
        authors = [piece.author for piece in request.pieces]
        got = oracle.Written(request.output, authors, request.finish_reason or "")
        assert (got, request.text) == want, (KINDS[job[0][0]], job, request.draft_len, request.drafter)
    for drafter in ("guide", "ngram"):
        counters = [r.counters for r in requests if r.drafter == drafter and r.draft_len is not None]
        assert 0 < sum(c.accepted for c in counters) < sum(c.drafted for c in counters)


def test_every_end_at_every_offset_of_a_cycle_is_that_of_the_twin() -> None:
    jobs = all_jobs()
    wanted = [expected(job) for job in jobs]
    assert {written.finish_reason for written, _ in wanted} == {"stop", "length"}
    assert {author for written, _ in wanted for author in written.authors} == {"base", "guide"}
    # Turned by an odd number, each job runs with the other drafter.
    for turn in (0, 5):
        check(jobs, wanted, SOME_ARMS[turn:] + SOME_ARMS[:turn])


@pytest.mark.slow
def test_every_end_in_every_arm_is_that_of_the_twin() -> None:
    jobs = all_jobs()
    wanted = [expected(job) for job in jobs]
    for turn in range(len(ARMS)):
        check(jobs, wanted, ARMS[turn:] + ARMS[:turn])
