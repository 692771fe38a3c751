"""Drawn schedules of recorded cycles, each held to the oracle; and that they notice what they are for."""

from collections import Counter
from typing import Any

import pytest

from nudging.core.policy_view import RequestView
from nudging.core.sequence import Sequence
from nudging.core.work import Work
from nudging.executor.cycles import overlap
from nudging.executor.cycles import slots as slots_module
from nudging.executor.cycles.overlap import Overlap
from nudging.executor.cycles.recorded_cycle import SlotStart
from nudging.executor.cycles.slots import Slot
from tests.support.cycle_schedules import run


def many(first: int, count: int) -> Counter[str]:
    """What happened in so many schedules from seed `first` on."""
    total = Counter[str]()
    for seed in range(first, first + count):
        total.update(run(seed).counts())
    return total


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_hundreds_of_schedules(first: int) -> None:
    total = many(first, 50)
    assert total["waited for while a later one was under way"] > 300
    assert min(total[how] for how in ("stop", "length", "abort", "error", "late", "preemptions")) > 0, total


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000_000, 1_020_000, 500))
def test_thousands_of_schedules(first: int) -> None:
    """20,000 in all; any more: `python -m tests.support.cycle_schedules --seed N --count M`."""
    many(first, 500)


def test_a_schedule_is_replayed_from_its_seed() -> None:
    first, again, other = (run(seed) for seed in (7, 7, 8))
    assert first.counts() == again.counts() != other.counts()
    assert first.world.digest == again.world.digest


def test_an_error_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "answers", lambda slot, work: [None])
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever comes first of it
        many(0, 5)
    assert "python -m tests.support.cycle_schedules --seed " in caught.value.__notes__[0]


def goes_on_over_a_later_cycle(ahead: Overlap, work: Work) -> bool:
    ahead._slots.pop(work.request, None)
    return True


def begins_wherever_prompts_end(work: Work, drafts: int, roles: tuple[str, ...]) -> bool:
    request = work.request
    return work.end - work.start <= 2 and all(
        request.sequences[role].num_computed >= request.context_length(role) - 1 for role in roles
    )


def answers_for_another_text(slot: Slot, work: Work) -> Any:
    rows, end = slot.rows.get(work.role, []), slot.end(work.role)
    first, last = work.first_row - end, work.end - end
    return rows[first : last + 1] if 0 <= first <= last < len(rows) else None


def counts_noise_from_one(work: Work) -> SlotStart:
    start = slots_module.slot_start(work)
    return start._replace(first=start.first + 1)


def owns_nothing(ahead: Overlap, slots: list[Slot]) -> bool:
    for slot in slots:
        for role in ahead._runners:
            slot.blocks[role] = slot.request.sequences[role].block_table.stamps()
    return True


def is_at_any_text(slots: list[Slot]) -> bool:
    return bool(slots)


def keeps_keys_of_what_is_gone(sequence: Sequence, length: int) -> None:
    del sequence._prefixes[length // sequence.block_table.pool.block_size :]


def drafts_what_is_not_finite(view: RequestView, role: str, length: int) -> Any:
    return view.rollout(role, length)


FAULTS: list[tuple[Any, str, Any]] = [
    (Overlap, "_give_up", goes_on_over_a_later_cycle),
    (Overlap, "_own_blocks", owns_nothing),
    (Slot, "answers", answers_for_another_text),
    (Sequence, "uncompute", keeps_keys_of_what_is_gone),
    (RequestView, "draft", drafts_what_is_not_finite),
    (overlap, "begins", begins_wherever_prompts_end),
    (overlap, "slot_start", counts_noise_from_one),
    (overlap, "is_at_text", is_at_any_text),
]


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS, ids=lambda one: getattr(one, "__name__", one))
def test_a_planted_fault_is_noticed(
    owner: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(Exception):  # noqa: B017, PT011 - an assertion, or what a broken device half raises
        many(0, 300)
