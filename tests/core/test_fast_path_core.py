"""The fast path by itself, from states that engines rarely come to: what is ordinary, to the last token."""

import random
from typing import Any

import pytest

from nudging import _C
from nudging.core.speculation.ledger import (
    MANY_ROWS,
    MAX_ADAPTIVE_DRAFT,
    Account,
    Costs,
    Drafting,
    Ledger,
    draft_length,
    drafting_cost,
)
from nudging.core.speculation.pass_costs import PassCosts
from nudging.core.speculation.shared_floats import address
from tests.support.fake import FixedCosts

PROMPT = [2, 3, 5, 7]
SOLO, TOKEN, WORD = (0, 0.0, False, 0), (1, 0.4, False, 0), (2, 0.4, False, 5)
VOCAB, END = 40, 9
# A token, and how sure the base is of it.
SURE, UNSURE = (11, 0.9), (12, 0.1)
FIXED = FixedCosts(1.0, 0.01), FixedCosts(0.1, 0.01)


class Core:
    """FastPath over pools of one size, with what they are made of."""

    def __init__(
        self, blocks: int = 50, prefix_caching: bool = False, costs: tuple[Costs, Costs] = FIXED
    ) -> None:
        # In the order in which they are given out.
        self.free = list(range(1, blocks))
        self.registered: list[tuple[int, int, list[int], int]] = []
        self.costs = costs
        pool = (self.allocate, self.free.append, lambda: len(self.free), 4, prefix_caching)
        self.fast_path = _C.FastPath([pool, pool], self.register, self.token_bytes, self.cost, self.curve)
        self.ledgers: list[Ledger] = []

    def allocate(self) -> int:
        return self.free.pop(0) if self.free else -1

    def register(self, lane: int, role: int, tokens: list[int], block: int) -> int:
        self.registered.append((lane, role, tokens, block))
        return block

    def token_bytes(self, lane: int, token: int) -> bytes:
        return b" x" if token % 2 else b"y"

    def cost(self, model: int, rows: float, answers: float) -> float:
        costs = self.costs[model]
        assert not isinstance(costs, PassCosts), "its curve was told"
        return costs.of(rows, answers)

    def curve(self, model: int) -> Any:
        costs = self.costs[model]
        return costs.curve if isinstance(costs, PassCosts) else None

    def ledger(self, roles: int) -> Ledger:
        return Ledger(dict(zip(("base", "guide")[:roles], self.costs, strict=False)))

    def enter(self, rule: Any, tracks: list[_C.SequenceState], **changes: Any) -> Ledger:
        """A request at the end of its prompt, the last token of which is not computed yet."""
        of_lane = {
            "begin": 0, "output": [], "max_tokens": 50, "draft_len": 0, "vocab": VOCAB, "stop_ids": [],
            "stops": [], "tail": b"", "is_greedy": True, "drafts": False, "need": (0, 4, 4, 0, False),
            "draft": None,
        }  # fmt: skip
        ledger = self.ledger(len(tracks))
        self.ledgers.append(ledger)
        state = _C.CarriedState(
            rule, tracks, *(of_lane | changes).values(), address(ledger), address(ledger.account)
        )
        self.fast_path.enter(len(self.ledgers) - 1, state)
        return ledger

    def plan(self, model: int) -> tuple[int, int, list[int]]:
        """Plan a pass and own its blocks."""
        planned = self.fast_path.plan(model)
        assert self.fast_path.own() == []
        return planned

    def take(self, *rows: tuple[int, float]) -> None:
        assert self.fast_path.take_rows([(0, token, token, prob) for token, prob in rows]) == []

    def goes_on(self, sharers: tuple[float, float] = (1.0, 1.0)) -> bool:
        """Whether lane 0 goes on without Python."""
        moved, back = self.fast_path.advance_before(1, list(sharers))
        assert (moved, back) in (([0], None), ([], 0))
        return back is None

    def passes(self, model: int, *rows: tuple[int, float]) -> bool:
        """A whole step of one pass; whether lane 0 went on without Python."""
        self.plan(model)
        self.take(*rows)
        return self.goes_on()


def track(model: int = 0, **changes: Any) -> _C.SequenceState:
    """The prompt, but for its last token computed, in one block."""
    of_track = {
        "prompt_len": 4, "max_len": 100, "max_sequence": 100, "ends": [END], "begin": 3, "tokens": [7],
        "num_computed": 3, "context_len": 4, "rows": [], "blocks": [0], "registered": 0, "own_from": 0,
    }  # fmt: skip
    return _C.SequenceState(model, *(of_track | changes).values())


@pytest.mark.parametrize(
    ("changes", "token", "is_ordinary"),
    [
        ({}, 11, True),
        ({}, END, False),
        ({"max_tokens": 2}, 11, True),
        ({"max_tokens": 1}, 11, False),
        ({"stop_ids": [30, 11]}, 11, False),
        ({"stop_ids": [30, 12]}, 11, True),
        ({"vocab": 12}, 11, True),
        ({"vocab": 11}, 11, False),
        ({}, 0, True),
        ({}, -1, False),
        ({"stops": [" x x"]}, 11, True),
        ({"stops": ["zz", " x x"], "tail": b" x"}, 11, False),
        ({"stops": [" x x", "z"], "tail": b" x"}, 11, False),
    ],
    ids=str,
)
def test_a_token_that_may_end_the_text_is_left_to_python(changes: Any, token: int, is_ordinary: bool) -> None:
    core = Core()
    core.enter(SOLO, [track()], **changes)
    assert core.passes(0, (token, 0.9)) == is_ordinary
    assert core.fast_path.take_written(0) == (([token], [0]) if is_ordinary else ([], []))


def test_stop_strings_are_found_across_tokens() -> None:
    core = Core()
    core.enter(SOLO, [track()], stops=["yyy x", "q"])
    for token in (12, 12, 12, 12):
        assert core.passes(0, (token, 0.9))
    assert not core.passes(0, (11, 0.9)), "of the tail just enough is kept"


@pytest.mark.parametrize(("max_sequence", "is_ordinary"), [(5, True), (4, False)])
def test_a_need_beyond_what_is_reserved_is_left_to_python(max_sequence: int, is_ordinary: bool) -> None:
    core = Core()
    core.enter(SOLO, [track(max_sequence=max_sequence)])
    assert core.passes(0, SURE) == is_ordinary


@pytest.mark.parametrize(("begin", "is_planned"), [(4, True), (3, False)])
def test_a_need_of_many_tokens_is_a_prompt(begin: int, is_planned: bool) -> None:
    core = Core()
    prompt = list(range(36))
    tokens = track(prompt_len=36, begin=begin, tokens=prompt[begin:], num_computed=begin, context_len=36)
    core.enter(SOLO, [tokens], need=(0, 36, 36, 0, False))
    count = 36 - begin
    assert core.fast_path.plan(0) == ((count, 8, []) if is_planned else (0, 0, [0]))
    assert core.fast_path.tokens() == (count if is_planned else 0)


@pytest.mark.parametrize(
    ("first", "blocks", "planned"),
    [(9, [0], (0, 0, [0])), (8, [0], (4, 1, [])), (9, [0, 40], (5, 1, []))],
)
def test_a_whole_block_that_others_may_have_made_is_looked_for_by_python(
    first: int, blocks: list[int], planned: Any
) -> None:
    core = Core(prefix_caching=True)
    text = list(range(2, 2 + first))
    whole = track(
        begin=0, tokens=text, num_computed=4, context_len=first, blocks=blocks, registered=1, own_from=1
    )
    core.enter(SOLO, [whole], need=(0, first, first, 0, False))
    assert core.fast_path.plan(0) == planned


def test_full_blocks_of_the_text_are_put_where_others_find_them() -> None:
    core = Core(prefix_caching=True)
    core.enter(SOLO, [track(begin=0, tokens=PROMPT)])
    assert core.fast_path.ready(0) == 1
    for token in (11, 13, 15, 17, 19):
        assert core.passes(0, (token, 0.9))
    assert core.registered == [(0, 0, PROMPT, 0), (0, 0, [11, 13, 15, 17], 1)]
    assert core.fast_path.held(0) == (5, [2])
    assert core.fast_path.counted(0) == ([5], 0, 0, {})


def test_without_a_block_a_lane_fails_alone() -> None:
    core = Core(blocks=2)
    for _ in range(2):
        core.enter(SOLO, [track(tokens=[2, 3, 5, 7], begin=0, num_computed=0, blocks=[])])
    assert core.fast_path.plan(0) == (8, 2, [])
    assert core.fast_path.own() == [1]
    assert [span[0] for span in core.fast_path.spans()] == [0]
    assert core.fast_path.tokens() == 4
    assert core.fast_path.take_rows([(0, 11, 11, 0.9)]) == []
    assert core.fast_path.advance_before(0, [1.0, 1.0]) == ([], None), "others come first"
    assert core.fast_path.advance_before(1, [1.0, 1.0]) == ([0], None)


def test_rows_that_are_not_finite_are_told_and_not_filed() -> None:
    core = Core()
    core.enter(SOLO, [track(tokens=[*PROMPT[3:], 11, 13])], need=(0, 4, 6, 0, False))
    assert core.plan(0) == (3, 1, [])
    assert core.fast_path.answers() == 3
    row = (0, 11, 11, 0.9)
    assert core.fast_path.take_rows([row, None, row]) == [(0, 0, 5, 1)]
    assert core.goes_on()
    core.plan(0)
    assert core.fast_path.take_rows([None]) == [(0, 0, 5, 0)]


def test_blocks_behind_a_row_that_is_not_finite_are_nobody_elses() -> None:
    core = Core(prefix_caching=True)
    core.enter(SOLO, [track(begin=0, tokens=PROMPT)])
    core.plan(0)
    assert core.fast_path.take_rows([None]) == [(0, 0, 4, 0)]
    assert core.registered == []


def word_core(rows: int = 50, **changes: Any) -> Core:
    """The guide is asked for a word."""
    core = Core(rows)
    guide = track(1, **changes)
    base = track(num_computed=4, rows=[(4, *UNSURE[:1] * 2, 0.1)])
    core.enter(WORD, [base, guide], need=(1, 4, 4, 4, True))
    return core


@pytest.mark.parametrize(
    ("changes", "of_track", "saved", "length"),
    [
        ({}, {}, 99.0, 8),
        # A row of the guide costs .11, and five run.
        ({}, {}, 5 * 0.11 * 4.5, 5),
        ({}, {}, 5 * 0.11 * 0.5, 2),
        ({}, {}, -1.0, 2),
        # Its sequence may hold so many tokens, of which four are there.
        ({}, {"max_sequence": 7}, 99.0, 4),
        ({"draft_len": 4}, {}, 99.0, 2),
        ({"draft_len": 0}, {}, 99.0, 2),
        ({"drafts": False}, {}, 99.0, 2),
        # The look-ahead and the longest draft.
        ({"steps": 50}, {}, 99.0, 1 + 5 + MAX_ADAPTIVE_DRAFT),
        ({"steps": 1}, {}, 99.0, 1),
    ],
)
def test_a_words_guide_writes_on_while_others_write_as_far_as_it_can_afford(
    changes: dict[str, Any], of_track: dict[str, Any], saved: float, length: int
) -> None:
    core, steps = Core(), changes.pop("steps", 8)
    base = track(num_computed=4, rows=[(4, *UNSURE[:1] * 2, 0.1)])
    wanted = {"need": (1, 4, 4, 1, True), "drafts": True, "draft_len": -1} | changes
    ledger = core.enter(WORD, [base, track(1, **of_track)], **wanted)
    ledger.account.paid, ledger.lazy = -saved, 1e6
    core.plan(1)
    core.fast_path.cap_paths(steps, 5)
    assert core.fast_path.path_lengths() == [length]
    if wanted["draft_len"] < 0 and wanted["drafts"] and steps == 8 and not of_track:
        assert min(7, max(1, ledger.affordable_rows("guide", 5))) + 1 == length


def test_by_token_a_guide_writes_no_further_than_it_was_asked() -> None:
    core = Core()
    base = track(num_computed=4, rows=[(4, *UNSURE[:1] * 2, 0.1)])
    ledger = core.enter(TOKEN, [base, track(1)], need=(1, 4, 4, 1, True), drafts=True, draft_len=-1)
    ledger.account.paid, ledger.lazy = -99.0, 1e6
    core.plan(1)
    core.fast_path.cap_paths(8, 1)
    assert core.fast_path.path_lengths() == [2]


def test_what_one_has_not_saved_itself_it_does_not_spend_beyond_its_loan() -> None:
    rich = Account(lazy=1e6)
    ledger = Ledger({"base": FIXED[0], "guide": FIXED[1]}, rich, lazy=10.0)
    ledger.share({"base": 1.0, "guide": 1.0})
    ledger.pay("base", 1, 1)
    ledger.plan(3.0)
    # 10.2 less 1.01 paid and 3 planned, and a loan of 1.01; a row costs .11.
    assert ledger.affordable_rows("guide", 1) == int((1.02 * 10 - 3) / 0.11)
    assert ledger.affordable_rows("guide", 1000) == int((1.02 * 10 - 3) / 0.11), "what others saved suffices"
    assert Ledger(ledger.costs, Account(lazy=1e9), lazy=1e9).affordable_rows("guide", 1) == MANY_ROWS


def test_a_path_goes_on_until_its_end_and_its_first_word_is_written() -> None:
    core = word_core()
    assert (core.fast_path.ready(0), core.fast_path.ready(1)) == (0, 1)
    assert core.plan(1) == (1, 1, [])
    assert core.fast_path.path_lengths() == [5]
    core.fast_path.cap_paths(4, 1)
    assert core.fast_path.path_lengths() == [4]
    spans = []
    for token in (11, 12, 13, 14):
        core.take((token, 0.9))
        spans += [span[:6] for span in core.fast_path.spans()]
        went_on = core.fast_path.onward()
    assert not went_on
    assert spans == [
        (0, 1, 3, 4, 4, [7]),
        (0, 1, 4, 5, 5, [11]),
        (0, 1, 5, 6, 6, [12]),
        (0, 1, 6, 7, 7, [13]),
    ]
    assert core.fast_path.held(0) == (0, [1, 2])
    assert core.goes_on(), "the last of five rows is missing"
    assert core.plan(1) == (1, 0, [])
    core.take((15, 0.9))
    assert core.goes_on()
    assert core.fast_path.take_written(0) == ([11, 12], [1, 1])


@pytest.mark.parametrize(("blocks", "goes_on"), [(2, True), (1, False)])
def test_a_path_ends_where_no_block_is_left(blocks: int, goes_on: bool) -> None:
    core = word_core(blocks)
    core.plan(1)
    core.take((11, 0.9))
    assert core.fast_path.onward() == goes_on
    if goes_on:
        core.take((12, 0.9))
        assert core.fast_path.onward(), "it has its block already"
    assert core.fast_path.held(0) == (0, [1, 2 if goes_on else 1])


def test_what_python_carries_is_computed_once_and_not_with_the_paths() -> None:
    core = word_core()
    core.plan(1)
    core.fast_path.add_foreign([2, 3], 0, 2, 1, 0, [9])
    assert core.fast_path.sizes(4) == (3, 2, 8, 3)
    core.plan(1)
    assert core.fast_path.sizes(4) == (1, 1, 8, 1)
    core.fast_path.add_foreign([2, 3], 0, 2, 1, 0, [9])
    core.take((11, 0.9))
    assert core.fast_path.onward()
    assert core.fast_path.sizes(4) == (1, 1, 8, 1)


@pytest.mark.parametrize("path", [(11, 12, END), (END,)], ids=str)
def test_a_path_that_meets_an_end_is_read_no_further(path: tuple[int, ...]) -> None:
    core = word_core()
    core.plan(1)
    for token in path:
        core.take((token, 0.9))
        went_on = core.fast_path.onward()
    assert not went_on
    assert not core.goes_on(), "what the end means, Python says"
    assert core.fast_path.take_written(0) == ([], [])


@pytest.mark.parametrize(("max_len", "rows"), [(3, None), (4, 1), (6, 3)])
def test_a_path_ends_where_the_context_is_full(max_len: int, rows: int | None) -> None:
    core = word_core(max_len=max_len)
    core.plan(1)
    for token in (12,) * (rows or 1):
        core.take((token, 0.9))
        core.fast_path.onward()
    assert core.goes_on() == (rows is not None)
    assert core.fast_path.take_written(0) == ([12] * (rows or 0), [1] * (rows or 0))


def guide_core(of_lane: Any = None, **changes: Any) -> Core:
    """The guide has computed a path of eight tokens behind the prompt, the rows of which are lost."""
    core = Core()
    guide = track(1, begin=0, tokens=[*PROMPT, *[12] * 8], num_computed=12, blocks=[0, 48, 49], **changes)
    core.enter(TOKEN, [track(), guide], **(of_lane or {}))
    return core


def test_what_others_share_or_find_is_not_written_again() -> None:
    assert guide_core().passes(0, UNSURE)
    assert not guide_core(own_from=1).passes(0, UNSURE)
    assert not guide_core(registered=1).passes(0, UNSURE)


def test_a_path_that_the_text_leaves_gives_its_blocks_back() -> None:
    core = guide_core(registered=1, rows=[(4, 12, 12, 0.9), (5, 12, 12, 0.9), (6, 12, 12, 0.9)])
    assert core.passes(0, (11, 0.9))
    assert core.passes(0, UNSURE)
    assert core.free[-2:] == [49, 48]
    tracks, output, begin, need, draft = core.fast_path.leave(0)
    assert (output, begin, need, draft) == ([11], 0, (1, 5, 5, 0, False), None)
    guide = tracks[1]
    assert (guide.tokens, guide.num_computed, guide.context_len) == ([*PROMPT, 11], 4, 5)
    assert (guide.blocks, guide.rows) == ([0], [])


def test_without_a_draft_the_guide_is_not_looked_at() -> None:
    core = guide_core({"drafts": True})
    assert core.passes(0, SURE)
    tracks, _, _, need, draft = core.fast_path.leave(0)
    assert tracks[1].tokens == [*PROMPT, *[12] * 8]
    assert (need, draft) == ((0, 5, 5, 0, False), (1, 0, []))


def random_costs(rng: random.Random, scale: float) -> Costs:
    """What passes cost: so much a row, or as they were timed, some times or never."""
    if rng.random() < 0.4:
        return FixedCosts(scale, scale * rng.choice([0.0, 0.01, 0.3]), scale * rng.choice([0.0, 0.05]))
    costs = PassCosts(int(1e10 * scale), rng.choice([0.0, 0.25]))
    for rows in sorted(rng.choices([1, 2, 3, 6, 8, 12, 40], k=rng.choice([0, 1, 2, 5]))):
        costs.record(rows, rng.choice([1, rows]), scale * (1 + rng.choice([0.01, 0.1]) * rows))
    return costs


def compare_drafts(rng: random.Random) -> int:
    """One draft, planned by a lane and by its twin in Python from the same numbers; its length."""
    core = Core(costs=(random_costs(rng, 1.0), random_costs(rng, rng.choice([0.02, 0.1, 0.3, 2.0]))))
    sharers = {"base": rng.choice([1.0, 1.0, 2.5, 6.0]), "guide": rng.choice([1.0, 1.5])}
    max_tokens, behind = rng.choice([4, 50]), rng.randrange(3)
    guide = track(1, begin=0, tokens=PROMPT, num_computed=3 - behind)
    ledger = core.enter(TOKEN, [track(), guide], drafts=True, draft_len=-1, max_tokens=max_tokens)
    twin = core.ledger(2)
    twin.account = Account(rng.choice([5.0, 20.0, 200.0]))
    twin.lazy = rng.choice([3.0, 30.0])
    twin.paid = twin.lazy * rng.uniform(0.8, 1.03)
    twin.account.paid = twin.account.lazy * rng.uniform(0.8, 1.02)
    twin.agreement = rng.choice([rng.random(), 0.9, 0.98, 1.0])
    twin.ask("base", 4)
    twin.plan(twin.price("base", rng.choice([1, 2]), 1))
    for mine, theirs in ((ledger, twin), (ledger.account, twin.account)):
        mine.numbers[:] = theirs.numbers
    core.plan(0)
    core.take(SURE)
    twin.pay("base", 1, 1)
    assert ledger.numbers == twin.numbers
    assert core.goes_on((sharers["base"], sharers["guide"]))
    # The same in Python.
    twin.ask("base", 5)
    twin.share(sharers)
    drafting = Drafting("guide", 0, 2 + behind)
    length = draft_length(twin, "base", 1, drafting, max_tokens - 2)
    twin.plan(drafting_cost(twin, drafting, length) + twin.price("base", 1 + length, 1 + length))
    need = (1, 5, 5, length - 1, True) if length else (0, 5, 5, 0, False)
    assert core.fast_path.leave(0)[-2:] == (need, (1, length, []))
    assert ledger.numbers == twin.numbers
    assert ledger.account.numbers == twin.account.numbers
    return length


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_a_draft_is_as_long_as_in_python_on_the_same_numbers(first: int) -> None:
    lengths = [compare_drafts(random.Random(seed)) for seed in range(first, first + 500)]
    assert set(lengths) == set(range(MAX_ADAPTIVE_DRAFT + 1))
