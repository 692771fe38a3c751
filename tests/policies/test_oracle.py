"""The twins of token-level and word-level nudging do what the method says: hand-made and random examples."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.support.oracle import (
    Gate,
    Params,
    Role,
    Written,
    base,
    guide,
    nudging_token,
    nudging_word,
    top_prob,
)
from tests.support.tiny import HashModel

PIECES = ["E", "a", "b", "c", "_a", "_b", "_c", "x", "y", "z"]  # "_" stands for a space, E for the end
END = frozenset({0})
SEEDS = range(12)


def starts_with_space(token: int) -> bool:
    """Whether the token begins a word: in the hand-made vocabulary, and for a third of any other."""
    return token in (4, 5, 6) if token < len(PIECES) else token % 3 == 0


def ids(text: str) -> list[int]:
    """The ids of space-separated pieces."""
    return [PIECES.index(piece) for piece in text.split()]


@dataclass(frozen=True)
class Script:
    """At output position n it says the n-th piece, with that probability: "a:.9 _b:.2"; behind the end, z."""

    steps: str

    def __call__(self, read: list[int]) -> Tensor:
        """The logits [vocab] after a prompt of one id and len(read) - 1 written ones."""
        steps = self.steps.split()
        piece, prob = steps[len(read) - 1].split(":") if len(read) <= len(steps) else ("z", "1")
        row = torch.full((len(PIECES),), (1 - float(prob)) / (len(PIECES) - 1))
        row[PIECES.index(piece)] = float(prob)
        return row.log()


def script(steps: str, eos: frozenset[int] = END) -> Role:
    """A role that reads from a script; where no probability is given it is 0.9."""
    return Role(Script(" ".join(s if ":" in s else f"{s}:.9" for s in steps.split())), prompt=[7], eos=eos)


def word(base_steps: str, guide_steps: str, **params: object) -> tuple[str, str, str]:
    """What word-level nudging at 0.4 makes of two scripts: pieces, authors' initials, finish reason."""
    options = Params(**{"max_tokens": 40, **params})  # type: ignore[arg-type]
    written = nudging_word(script(base_steps), script(guide_steps), options, Gate(0.4), starts_with_space)
    return shown(written)


def shown(written: Written) -> tuple[str, str, str]:
    """Pieces, authors' initials and the finish reason."""
    pieces = " ".join(PIECES[token] for token in written.token_ids)
    return pieces, "".join(author[0] for author in written.authors), written.finish_reason


def pair(seed: int, vocab: int = 33) -> tuple[Role, Role]:
    """Hash models under prompts of their own: a base sure in 60 % of the rows, both ending now and then."""
    speaks = HashModel(seed, vocab, confident=0.6, eos=0, eos_rate=0.03)
    nudges = HashModel(seed + 1000, vocab, agrees_with=speaks, agreement=0.5, eos=1, eos_rate=0.03)
    return Role(speaks, [3, 4], END), Role(nudges, [5, 6, 7], frozenset({1}))


def word_policy(base: Role, guide: Role, params: Params, gate: Gate) -> Written:
    return nudging_word(base, guide, params, gate, starts_with_space)


both_policies = pytest.mark.parametrize("policy", [nudging_token, word_policy])
both_temperatures = pytest.mark.parametrize("temperature", [0.0, 1.0])
PolicyTwin = Callable[[Role, Role, Params, Gate], Written]


def test_the_worked_example_of_the_token_policy() -> None:
    written = nudging_token(script("a:.7 b:.35 E:.9"), script("c:.5 a:.5 c:.5"), Params(), Gate(0.4))
    assert shown(written) == ("a a", "bg", "stop")


@both_policies
@both_temperatures
def test_threshold_zero_is_the_base_alone(policy: PolicyTwin, temperature: float) -> None:
    for seed in SEEDS:
        roles, params = pair(seed), Params(max_tokens=24, temperature=temperature, seed=seed)
        assert policy(*roles, params, Gate(0.0)) == base(roles[0], params)


@both_policies
@both_temperatures
def test_a_threshold_above_one_is_the_guide_alone(policy: PolicyTwin, temperature: float) -> None:
    for seed in SEEDS:
        roles, params = pair(seed), Params(max_tokens=24, temperature=temperature, seed=seed)
        assert policy(*roles, params, Gate(1.01)) == guide(roles[1], params)


@both_policies
@both_temperatures
def test_a_guide_that_is_the_base_changes_nothing(policy: PolicyTwin, temperature: float) -> None:
    authors: set[str] = set()
    for seed in SEEDS:
        role, params = pair(seed)[0], Params(max_tokens=24, temperature=temperature, seed=seed)
        written, alone = policy(role, role, params, Gate(0.4)), base(role, params)
        assert (written.token_ids, written.finish_reason) == (alone.token_ids, alone.finish_reason)
        authors.update(written.authors)
    assert authors == {"base", "guide"}


@both_temperatures
def test_a_token_is_the_guides_exactly_where_the_base_is_unsure(temperature: float) -> None:
    authors: set[str] = set()
    for seed in SEEDS:
        roles, params = pair(seed), Params(max_tokens=24, temperature=temperature, seed=seed)
        written = nudging_token(*roles, params, Gate(0.4))
        for i, author in enumerate(written.authors):
            assert (author == "guide") == (top_prob(roles[0].row(written.token_ids[:i])) < 0.4)
        authors.update(written.authors)
    assert authors == {"base", "guide"}


def test_the_guide_looks_ahead_as_far_as_its_context_goes() -> None:
    """An end of sequence in sight makes it write all that is left, else it writes one word."""
    speaks, nudges = script("b:.3 c"), script("a _b x E")
    for max_len, wanted in ((3, ("a c", "gb", "length")), (4, ("a _b", "gg", "length"))):
        written = word_policy(speaks, replace(nudges, max_len=max_len), Params(max_tokens=2), Gate(0.4))
        assert shown(written) == wanted


def test_a_guides_word_is_never_questioned_and_a_base_token_always() -> None:
    finished: set[str] = set()
    for seed in range(40):
        (speaks, nudges), params = pair(seed), Params(max_tokens=24)
        written = nudging_word(speaks, nudges, params, Gate(0.4), starts_with_space)
        finished.add(written.finish_reason)
        i = 0
        while i < len(written.token_ids):
            before = written.token_ids[:i]
            ahead = guide(replace(nudges, prompt=nudges.prompt + before), Params(max_tokens=16))
            if top_prob(speaks.row(before)) >= 0.4:
                run, author = [int(speaks.row(before).argmax())], "base"
            elif ahead.finish_reason == "stop":
                run, author = ahead.token_ids, "guide"
            else:
                starts = [j for j in range(1, 16) if starts_with_space(ahead.token_ids[j])]
                run, author = ahead.token_ids[: min(starts, default=16)], "guide"
            run = run[: 24 - i]
            assert written.token_ids[i : i + len(run)] == run
            assert written.authors[i : i + len(run)] == [author] * len(run)
            i += len(run)
    assert finished == {"stop", "length"}


@both_policies
@both_temperatures
def test_a_shorter_text_is_the_beginning_of_a_longer_one(policy: PolicyTwin, temperature: float) -> None:
    for seed in SEEDS:
        roles, params = pair(seed), Params(max_tokens=24, temperature=temperature, seed=seed)
        whole = policy(*roles, params, Gate(0.4))
        for n in range(25):
            cut = policy(*roles, replace(params, max_tokens=n), Gate(0.4))
            ends = "stop" if n > len(whole.token_ids) else "length"
            assert cut == Written(whole.token_ids[:n], whole.authors[:n], ends)


@both_policies
def test_the_seed_decides_what_is_sampled(policy: PolicyTwin) -> None:
    roles, params = pair(5), Params(max_tokens=24, temperature=1.0, ignore_eos=True)
    texts = [policy(*roles, replace(params, seed=seed), Gate(0.4)).token_ids for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


@both_policies
def test_a_bias_moves_the_choice_and_not_the_author(policy: PolicyTwin) -> None:
    roles = pair(2, vocab=33)
    banned = Params(max_tokens=24, logit_bias=dict.fromkeys(range(2, 33, 2), -math.inf), ignore_eos=True)
    assert all(token < 2 or token % 2 for token in policy(*roles, banned, Gate(0.4)).token_ids)
    wanted = Params(max_tokens=24, temperature=1.0, logit_bias={6: 100.0})
    written = policy(*roles, wanted, Gate(0.4))
    assert written.token_ids == [6] * 24
    assert set(written.authors) == {"base", "guide"}


@both_policies
@pytest.mark.parametrize(("comparator", "author"), [("<", "base"), ("<=", "guide")])
def test_a_base_exactly_at_the_threshold(policy: PolicyTwin, comparator: str, author: str) -> None:
    roles = script("a:1 a:1"), script("b b")
    assert policy(*roles, Params(max_tokens=2), Gate(1.0, comparator)).authors == [author] * 2


@both_policies
def test_only_the_owners_end_of_sequence_ends_the_text(policy: PolicyTwin) -> None:
    nobody: frozenset[int] = frozenset()
    sure, unsure = "a E c", "a:.2 E:.2 c:.2"
    for base_steps, base_eos, guide_eos, text in [
        (sure, END, nobody, "a"),
        (sure, nobody, END, "a E c"),
        (unsure, END, nobody, "a E c"),
        (unsure, nobody, END, "a"),
    ]:
        roles = script(base_steps, base_eos), script("a E c", guide_eos)
        assert shown(policy(*roles, Params(max_tokens=3), Gate(0.4)))[0] == text


@both_policies
def test_an_ignored_end_of_sequence_is_a_token_like_any_other(policy: PolicyTwin) -> None:
    roles, params = (script("a E:.2 c E"), script("z E x y")), Params(max_tokens=4, ignore_eos=True)
    written = shown(policy(*roles, params, Gate(0.4)))
    assert written[0].startswith("a E")
    assert written[1:] == ("bgbb" if policy is nudging_token else "bggg", "length")


@both_policies
def test_a_stop_token_ends_the_text_whoever_writes_it(policy: PolicyTwin) -> None:
    params = Params(max_tokens=5, stop_token_ids=frozenset(ids("c")))
    assert shown(policy(script("a b c a"), script("x x x x"), params, Gate(0.4))) == ("a b", "bb", "stop")
    assert shown(policy(script("a b:.1 x:.1"), script("x b c a"), params, Gate(0.4))) == ("a b", "bg", "stop")


@pytest.mark.parametrize(
    ("base_steps", "guide_steps", "expected"),
    [
        pytest.param("a:.2 x x E", "a b _c _c", ("a b x", "ggb", "stop"), id="inside a word nobody asks"),
        pytest.param(
            "a:.2 x E", "_a b _c _c", ("_a b", "gg", "stop"), id="a first space belongs to the word"
        ),
        pytest.param("a:.2 _b E", "a _b _c", ("a _b", "gb", "stop"), id="a word may be one token"),
        pytest.param("a:.2 b:.2 E", "a _b _c", ("a _b", "gg", "stop"), id="word after word"),
        pytest.param("a:.2 x x x", "a _b _c E", ("a _b _c", "ggg", "stop"), id="the end in sight: all of it"),
        pytest.param("a:.2 x x x", "E a a", ("", "", "stop"), id="the end at once"),
        pytest.param("x y:.39 E", "a b _c", ("x b", "bg", "stop"), id="the guide reads on from the base"),
        pytest.param("E a a", "a a a", ("", "", "stop"), id="a sure base ends the text"),
        pytest.param("E:.2 a E", "a _a", ("a a", "gb", "stop"), id="an unsure base does not"),
    ],
)
def test_word_examples_made_by_hand(
    base_steps: str, guide_steps: str, expected: tuple[str, str, str]
) -> None:
    assert word(base_steps, guide_steps) == expected


def test_a_word_is_never_longer_than_the_look_ahead() -> None:
    base_steps = "a:.2 " + "x " * 15 + "y E"
    assert word(base_steps, "a " * 30) == ("a " * 16 + "y", "g" * 16 + "b", "stop")


@pytest.mark.parametrize(("length", "seen"), [(15, True), (16, False)])
def test_the_end_is_seen_within_sixteen_tokens(length: int, seen: bool) -> None:
    text = "a _b" + " _c" * (length - 2)
    expected = (text, "g" * length, "stop") if seen else ("a x", "gb", "stop")
    assert word("a:.2 x E", text + " E") == expected


def test_the_look_ahead_is_not_shortened_by_max_tokens() -> None:
    # With the end in sight at the third token, the second is not the base's to decide.
    assert word("a:.2 x", "a _b E", max_tokens=2) == ("a _b", "gg", "length")
    assert word("a:.2 x", "a _b _c", max_tokens=2) == ("a x", "gb", "length")


def test_a_stop_token_behind_the_word_is_only_looked_at() -> None:
    stop = frozenset(ids("_c"))
    assert word("a:.2 x E", "a _b _c", stop_token_ids=stop) == ("a x", "gb", "stop")
    assert word("a:.2 x E", "a _b _c x E", stop_token_ids=stop) == ("a _b", "gg", "stop")
