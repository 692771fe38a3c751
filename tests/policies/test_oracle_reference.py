"""The twin of the authors' released client, against recorded servers: golden traces made by hand."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tests.support.oracle import Completion, Gate, Params, Role, WrittenText, nudging_reference, text_client
from tests.support.tiny import HashModel

Token = tuple[str, float]
END: Token = ("", 0.9)


def says(*tokens: Token, finish: str = "length") -> Completion:
    """A base's completion: texts and top-1 probabilities."""
    texts = [text for text, _ in tokens]
    return Completion("".join(texts), texts, [prob for _, prob in tokens], finish)


def proposes(text: str, finish: str = "length") -> Completion:
    """A guide's completion, of which only the text and the finish matter."""
    return Completion(text, [text], [0.5], finish)


@dataclass
class Recorded:
    """A server that answers what it was recorded with, and fails on any other text."""

    answers: dict[str, Completion]
    asked: list[str] = field(default_factory=list)

    def __call__(self, text: str, max_tokens: int) -> Completion:
        assert max_tokens == 16
        self.asked.append(text)
        return self.answers[text]


def play(
    guide_answers: dict[str, Completion], base_answers: dict[str, Completion], max_tokens: int = 1000
) -> WrittenText:
    """What two recorded servers write at 0.4, lengths in characters; each answer is asked for once, in turn.

    The keys are the texts written before; the servers see the prompts "G:" and "B:" in front of them.
    """
    guide_server = Recorded({"G:" + text: answer for text, answer in guide_answers.items()})
    base_server = Recorded({"B:" + text: answer for text, answer in base_answers.items()})
    written = nudging_reference(base_server, guide_server, "B:", "G:", Gate(0.4), len, max_tokens)
    assert guide_server.asked == list(guide_server.answers)
    assert base_server.asked == list(base_server.answers)
    assert "".join(text for _, text in written.segments) == written.text
    return written


def test_the_worked_example_hands_over_by_agreement() -> None:
    written = play(
        {
            "": proposes("Sure, let me think"),
            "Sure, let me try": proposes(" it.", finish="stop"),
        },
        {
            "Sure,": says((" I", 0.2), (" am", 0.9)),
            "Sure, let": says((" me", 0.1), (" try", 0.5), (" this", 0.3), (" now", 0.9)),
        },
    )
    segments = [("guide", "Sure, let"), ("base", " me try"), ("guide", " it.")]
    assert written == WrittenText("Sure, let me try it.", segments, "stop")


def test_the_beginning_of_the_next_word_is_agreement_enough() -> None:
    written = play(
        {"": proposes("I am walking home"), "I am walk": proposes("ing.", finish="stop")},
        {"I": says((" was", 0.3)), "I am": says((" walk", 0.1), ("er", 0.2))},
    )
    assert written.segments == [("guide", "I am"), ("base", " walk"), ("guide", "ing.")]


def test_more_than_the_next_word_is_no_agreement() -> None:
    written = play(
        {"": proposes("I am to go"), "I am to": proposes(" go", finish="stop")},
        {"I": says((" amuse", 0.3)), "I am": says(("  to", 0.3)), "I am to": says(("go", 0.3))},
    )
    assert written.segments == [("guide", "I am to go")]


@pytest.mark.parametrize("prob", [0.4, 0.9])
def test_a_sure_base_takes_over_whatever_it_says(prob: float) -> None:
    written = play(
        {"": proposes("I am here"), "I stand": proposes(".", "stop")},
        {"I": says((" stand", prob), (" up", 0.39))},
    )
    assert written.segments == [("guide", "I"), ("base", " stand"), ("guide", ".")]


def test_a_base_below_the_threshold_does_not_take_over() -> None:
    written = play(
        {"": proposes("I am here"), "I am": proposes(" here", "stop")},
        {"I": says((" stand", 0.39), (" up", 0.9)), "I am": says((" up", 0.1))},
    )
    assert written.segments == [("guide", "I am here")]


def test_the_last_word_is_dropped_and_then_written_unasked() -> None:
    written = play(
        {
            "": proposes("one two thr"),
            "one two": proposes(" three four"),
            "one two three": proposes("!", "stop"),
        },
        {"one": says((" x", 0.1)), "one two": says((" x", 0.1)), "one two three": says((" x", 0.1))},
    )
    assert written.text == "one two three!"


def test_a_single_word_is_written_whole_and_the_base_is_not_asked() -> None:
    written = play({"": proposes("  Certainly"), "  Certainly": proposes("!", "stop")}, {})
    assert written.segments == [("guide", "Certainly!")]


def test_newlines_do_not_part_words() -> None:
    lines = "1.\n2.\n3.\n"
    written = play({"": proposes(lines), lines: proposes("4.", "stop")}, {})
    assert written == WrittenText("1.\n2.\n3.\n4.", [("guide", "1.\n2.\n3.\n4.")], "stop")


def test_several_spaces_are_kept_and_make_no_words() -> None:
    written = play(
        {"": proposes("  a   b c"), "  a   b": proposes("", "stop")},
        {"  a  ": says((" x", 0.1)), "  a   b": says((" y", 0.1))},
    )
    assert written.text == "a   b"


def test_a_base_that_would_end_hands_the_text_back() -> None:
    written = play(
        {"": proposes("Yes, of course"), "Yes,": proposes(" indeed.", "stop")},
        {"Yes,": says(END, finish="stop")},
    )
    assert written == WrittenText("Yes, indeed.", [("guide", "Yes, indeed.")], "stop")


def test_an_unsure_end_of_the_base_counts_as_agreement() -> None:
    written = play(
        {"": proposes("Yes, of course"), "Yes,": proposes(" indeed.", "stop")},
        {"Yes,": says(("", 0.1), finish="stop")},
    )
    assert written.text == "Yes, indeed."


def test_the_fourth_equal_nudge_ends_the_text() -> None:
    written = play({"go" * n: proposes("go") for n in range(4)}, {})
    assert written == WrittenText("gogogo", [("guide", "gogogo")], "stop")


def test_a_different_nudge_starts_the_count_anew() -> None:
    texts = ["go", "go", "go", "no", "go", "go", "go"]
    answers = {"".join(texts[:n]): proposes(text) for n, text in enumerate(texts)}
    written = play(answers | {"".join(texts): proposes("", "stop")}, {})
    assert written.text == "".join(texts)


def test_the_base_goes_on_over_several_completions_until_it_is_unsure() -> None:
    written = play(
        {"": proposes("So it is"), "So we go on": proposes(".", "stop")},
        {
            "So": says((" we", 0.9), (" go", 0.9)),
            "So we go": says((" on", 0.4), (" and", 0.39), (" on", 0.9)),
        },
    )
    assert written.segments == [("guide", "So"), ("base", " we go on"), ("guide", ".")]


def test_a_base_that_stops_is_believed_from_its_second_completion_on() -> None:
    written = play(
        {"": proposes("So it is"), "So be it": proposes(".", "stop")},
        {
            "So": says((" be", 0.9), (" it", 0.9), END, finish="stop"),
            "So be it": says(END, finish="stop"),
        },
    )
    assert written.text == "So be it."
    written = play(
        {"": proposes("So it is"), "So be it!": proposes("", "stop")},
        {"So": says((" be", 0.9), (" it", 0.9)), "So be it": says(("!", 0.9), END, finish="stop")},
    )
    assert written.text == "So be it!"


def test_a_completion_the_run_already_holds_ends_the_run() -> None:
    written = play(
        {"": proposes("He said so"), "He ha ha": proposes(".", "stop")},
        {"He": says((" ha ha", 0.9), (" ha", 0.9))},
    )
    assert written.text == "He ha ha."


@pytest.mark.parametrize(("line", "times"), [(" a b c d e", 1), (" a b c d", 2)])
def test_more_than_five_words_that_stand_in_the_text_already_are_dropped(line: str, times: int) -> None:
    # Words as their client counts them: what stands between spaces, before the first one too.
    written = play(
        {"": proposes("1: x"), f"1:{line} 2:" + line * (times - 1): proposes("", "stop")},
        {
            "1:": says((" a", 0.9), (line[2:], 0.9), (" 2:", 0.9)),
            f"1:{line} 2:": says((line, 0.9), (" f", 0.1)),
        },
    )
    assert written.text == f"1:{line} 2:" + line * (times - 1)


def test_words_of_an_earlier_run_are_dropped_too() -> None:
    first = "1: a b c d e!"
    written = play(
        {"": proposes("1: x"), first: proposes(" 2: x"), first + " 2: so": proposes("", "stop")},
        {
            "1:": says((" a", 0.9), (" b c d e!", 0.9), (" f", 0.1)),
            first + " 2:": says((" so", 0.9), (" a b c d e", 0.9), (" f", 0.1)),
        },
    )
    assert written.text == first + " 2: so"


@pytest.mark.parametrize(("max_tokens", "text"), [(10, "So it goes"), (11, "So it goes on so")])
def test_at_max_tokens_no_round_begins_and_no_run_goes_on(max_tokens: int, text: str) -> None:
    answers = {"So": says((" it", 0.9), (" goes", 0.9)), "So it goes": says((" on", 0.9), (" so", 0.9))}
    if max_tokens == 10:
        del answers["So it goes"]
    written = play({"": proposes("So it is")}, answers, max_tokens)
    assert written == WrittenText(text, [("guide", "So"), ("base", text[2:])], "length")


def test_without_tokens_to_write_nobody_is_asked() -> None:
    assert play({}, {}, max_tokens=0) == WrittenText("", [], "length")


def test_a_text_has_at_most_150_rounds() -> None:
    calls: list[str] = []

    def turns(text: str, max_tokens: int) -> Completion:
        calls.append(text)
        return proposes("ab"[len(calls) % 2])

    written = nudging_reference(turns, turns, "", "", Gate(0.4), lambda text: 0)
    assert (len(calls), written.finish_reason) == (150, "length")


@pytest.mark.parametrize(
    ("before", "size", "times", "left"),
    [
        pytest.param("x", 29, 2, 2, id="too short"),
        pytest.param("x", 30, 2, 1, id="long enough"),
        pytest.param("", 47, 2, 1, id="nothing before it"),
        pytest.param("x", 40, 4, 1, id="again and again"),
        pytest.param("x", 30, 3, 3, id="bisection meets 45 and gives up"),
        pytest.param("x" * 20, 30, 2, 2, id="bisection meets 40 and gives up"),
    ],
)
def test_a_repeated_ending_is_removed_where_bisection_finds_it(
    before: str, size: int, times: int, left: int
) -> None:
    line = "".join(chr(ord("A") + i) for i in range(size))
    written = play({"": proposes(before + line * times, "stop")}, {})
    assert written.text == before + line * left


def test_segments_are_cut_where_the_text_is() -> None:
    line = " and-so-on-and-on-and-on-it-goes;"
    written = play(
        {"": proposes("\nA now"), "\nA" + line * 2: proposes(" \n", "stop")},
        {"\nA": says((" and", 0.9), (line[4:], 0.9)), "\nA" + line: says((line, 0.9), ("?", 0.1))},
    )
    assert written == WrittenText("A" + line, [("guide", "A"), ("base", line)], "stop")


LETTERS = "abcd "
EOS = len(LETTERS)


def letters(seed: int) -> HashModel:
    """A model over LETTERS and EOS."""
    return HashModel(seed, vocab=EOS + 1, sharpness=1.5)


def encode(text: str) -> list[int]:
    """One id per letter, after a first id as tokenizers add it."""
    return [EOS, *(LETTERS.index(letter) for letter in text)]


def spell(token: int) -> bytes:
    """The text of a token."""
    return LETTERS[token].encode()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_the_models_own_text_with_its_noise(temperature: float) -> None:
    finished: set[str] = set()
    for seed in range(20):
        model, params = letters(seed), Params(temperature=temperature, seed=seed, logit_bias={EOS: -1.5})
        alone = oracle.guide(Role(model, encode("ab"), frozenset({EOS})), params)
        client = text_client(model, encode, spell, frozenset({EOS}), "ab", params)
        completion = client("ab", 16)
        text = "".join(LETTERS[token] for token in alone.token_ids)
        assert (completion.text, completion.finish) == (text, alone.finish_reason)
        assert completion.tokens == [*text] + [""] * (completion.finish == "stop")
        assert len(completion.probs) == len(completion.tokens)
        half = len(text) // 2
        assert client("ab" + text[:half], 16).text.startswith(text[half:])
        finished.add(completion.finish)
    assert finished == {"stop", "length"}


def test_halves_of_characters_are_replaced_in_tokens_and_joined_in_the_text() -> None:
    def alternates(ids: list[int]) -> Tensor:
        return torch.eye(2)[(len(ids) - 1) % 2]

    halves = ["é".encode()[:1], "é".encode()[1:]]
    client = text_client(alternates, lambda text: [0], halves.__getitem__, frozenset(), "", Params())
    completion = client("", 5)
    assert completion.tokens == ["\ufffd"] * 5
    assert completion.text == "éé\ufffd"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_begins_with_the_guides_word_and_joins_its_segments(temperature: float) -> None:
    authors: set[str] = set()
    for seed in range(20):
        params = Params(temperature=temperature, seed=seed, logit_bias={EOS: -1.5})
        base = text_client(letters(seed), encode, spell, frozenset({EOS}), "b", params)
        guide = text_client(letters(seed + 100), encode, spell, frozenset({EOS}), "ca", params)
        written = nudging_reference(base, guide, "b", "ca", Gate(0.4), len, 40)
        assert written == nudging_reference(base, guide, "b", "ca", Gate(0.4), len, 40)
        assert "".join(text for _, text in written.segments) == written.text
        assert all(a[0] != b[0] for a, b in zip(written.segments, written.segments[1:], strict=False))
        first = guide("ca", 16).text.strip(" ").split(" ")[0]
        assert written.segments == [] or written.segments[0][1].startswith(first)
        authors.update(author for author, _ in written.segments)
    assert authors == {"base", "guide"}
