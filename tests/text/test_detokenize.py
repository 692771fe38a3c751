"""Streaming text is whole characters, adds up to one decode, and ends where the first stop string does."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nudging.errors import BadRequest
from nudging.text.detokenizer import Detokenizer, StopChecker
from tests.support.fake import TableTokenizer
from tests.support.oracle import cut_at_stop
from tests.support.texts import ANY_TEXT

PROPERTY = settings(max_examples=300)


def streamed(table: list[bytes]) -> tuple[list[str], str]:
    """What comes out token by token and at the end, for the text of all tokens of the table in order."""
    detokenizer = Detokenizer(TableTokenizer(table))
    return [detokenizer.push(token) for token in range(len(table))], detokenizer.flush()


# Bytes that begin, continue and break characters, so that every kind of bad UTF-8 occurs.
BYTES = st.sampled_from(b"A \x7f\x80\x9f\xa0\xbf\xc0\xc3\xe0\xe2\xed\xf0\xf4\xff")
TOKENS = st.lists(st.binary(max_size=5) | st.lists(BYTES, max_size=4).map(bytes), max_size=12)


@PROPERTY
@given(table=TOKENS)
@example(table=[b"\xf0\x9f", b"", b"\x98", b"\x80\xe2\x82", b"\xc3\xa9", b"\xf0\x9f\x98"])
def test_what_is_streamed_is_the_whole_decode(table: list[bytes]) -> None:
    pieces, rest = streamed(table)
    assert "".join(pieces) + rest == TableTokenizer(table).text_of(range(len(table)))


@PROPERTY
@given(text=ANY_TEXT, sizes=st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_a_character_comes_out_whole_and_as_soon_as_its_last_byte(text: str, sizes: list[int]) -> None:
    data = text.encode()
    table: list[bytes] = []
    while data:
        size = sizes[len(table) % len(sizes)]
        table.append(data[:size])
        data = data[size:]
    pieces, rest = streamed(table)
    assert rest == ""
    for i in range(len(table)):
        assert "".join(pieces[: i + 1]) == b"".join(table[: i + 1]).decode("utf-8", "ignore")


def test_a_text_may_be_written_by_models_with_unlike_tokenizers() -> None:
    detokenizer = Detokenizer(TableTokenizer([b" caf\xc3"]))
    assert detokenizer.push(0) == " caf"
    assert detokenizer.push_bytes(b"\xa9!") == "\u00e9!"


def test_after_a_flush_a_new_text_begins() -> None:
    detokenizer = Detokenizer(TableTokenizer([b"\xc3", b"\xa9"]))
    assert detokenizer.push(0) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(1) == "\ufffd"


# Two letters only, so that stop strings overlap themselves, each other and what looked like their beginning.
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=3)


@PROPERTY
@given(pieces=st.lists(st.text("ab", max_size=6), max_size=8), stops=STOPS)
@example(pieces=["aab"], stops=["ab", "aabb"])
@example(pieces=["aa", "ab"], stops=["aab"])
@example(pieces=["aabaa", "abaab"], stops=["aabaab"])
@example(pieces=["a", "abc", "d"], stops=["bc", "aabcd"])
def test_the_cut_depends_on_the_text_alone(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(stops)
    written, stopped = "", False
    for piece in pieces:
        if not stopped:
            emitted, stopped = checker.push(piece)
            written += emitted
    assert (written + checker.flush(), stopped) == cut_at_stop("".join(pieces), stops)
    assert (checker.found is not None) == stopped


@PROPERTY
@given(text=st.text("ab", max_size=20), stops=STOPS)
def test_only_the_possible_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    emitted, stopped = StopChecker(stops).push(text)
    if not stopped:
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        ends = [n for n in range(len(text) + 1) if n == 0 or text[-n:] in beginnings]
        assert emitted == text[: len(text) - max(ends)]


def test_a_held_back_beginning_is_text_when_the_generation_ends() -> None:
    checker = StopChecker(["\nQuestion:", "END"])
    assert checker.push("It is 4.\nQues") == ("It is 4.", False)
    assert checker.flush() == "\nQues"


def test_the_found_stop_string_is_known() -> None:
    checker = StopChecker(("\n\n", "Question:"))
    assert checker.push("4\nQuestion: 5") == ("4\n", True)
    assert checker.found == "Question:"
    assert checker.flush() == ""


def test_without_stop_strings_all_text_passes() -> None:
    assert StopChecker(()).push("all") == ("all", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(BadRequest, match="empty"):
        StopChecker(["a", ""])
