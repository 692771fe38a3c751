"""How one request's text ends: what was held back becomes text, and a stop string in it still counts."""

from dataclasses import replace

import pytest

from nudging import Base, DeadlineExceeded, SamplingParams
from nudging.core.need import Need
from nudging.core.request import Request
from nudging.errors import OutOfBlocks
from nudging.text.prompts import RolePrompt
from tests.core.test_scheduler import finish, request, small_engine
from tests.support.fake import TableTokenizer

TABLE = TableTokenizer([b"a", b"\xc3", b"\xa9", b"!"])


def writing(stop: tuple[str, ...], timeout: float | None = None) -> Request:
    _, fakes = small_engine(20)
    roles = {"base": replace(fakes["base"], tokenizer=TABLE)}
    params = SamplingParams(max_tokens=4, stop=stop)
    return Request("r", Base(), params, 0, {"base": RolePrompt([2])}, roles, timeout=timeout)


@pytest.mark.parametrize(
    ("tokens", "stop", "reason", "text"),
    [
        ((0, 1), ("\ufffd",), "stop", "a"),
        ((0, 1), ("\ufffd!",), "abort", "a\ufffd"),
        ((0, 1, 2), ("\u00e9",), "stop", "a"),
        ((0, 3), ("!?",), "abort", "a!"),
        ((0, 1), (), "abort", "a\ufffd"),
        ((0, 0, 0, 1), ("\ufffd",), "stop", "aaa"),
        ((0, 0, 0, 3), ("\ufffd",), "length", "aaa!"),
    ],
)
def test_the_end_of_a_text_may_complete_a_stop_string(
    tokens: tuple[int, ...], stop: tuple[str, ...], reason: str, text: str
) -> None:
    job = writing(stop, timeout=1.0)
    for token in tokens:
        job.commit(token, "base")
    if not job.is_finished:
        job.expire()
    assert (job.finish_reason, job.text) == (reason, text)
    assert isinstance(job.error, DeadlineExceeded) == (reason == "abort"), "a text that is whole is not late"


def test_a_token_of_two_authors_is_whose_it_begins_with() -> None:
    class Pairs(TableTokenizer):
        def encode_continuation(self, text: str) -> list[int]:
            return {"abab!": [4, 0, 5, 3], "a!": [0, 3]}[text]

    table = Pairs([b"a", b"b", b"", b"!", b"ab", b"b"])
    for texts, authors in (
        ((("guide", "a"), ("base", "ba"), ("guide", "b"), ("base", "!")), ["guide", "base", "guide", "base"]),
        ((("base", "a"), ("guide", "!")), ["base", "guide"]),
    ):
        job = writing(())
        job.write_texts(texts, table)
        assert [piece.author for piece in job.pieces] == authors


def test_a_need_ends_where_its_path_does() -> None:
    assert (Need("base", 3, 5).end, Need("base", 3, 5, ahead=4).end) == (5, 9)


def test_one_that_lacks_a_block_and_is_alone_says_so() -> None:
    engine, roles = small_engine(20)
    job = request(roles, "r", 6, 20)
    engine.add(job)
    engine.step()
    pool = engine.runners["base"].pool
    # Somebody else takes all the blocks, as a caller's own code might.
    while pool.num_available:
        pool.allocate()
    finish(engine, limit=4)
    assert isinstance(job.error, OutOfBlocks)
    assert len(job.output) == 3, "as far as its blocks go"


def test_what_a_request_does_not_have_nobody_fetches() -> None:
    with pytest.raises(AttributeError, match="Request has no attribute 'texts'"):
        getattr(writing(()), "texts")  # noqa: B009


def test_the_first_token_has_its_time_and_keeps_it() -> None:
    job = writing(())
    job.clock = iter([3.0, 7.0]).__next__
    job.commit(0, "base")
    job.commit(0, "base")
    assert job.counters.first_token_at == 3.0


def test_blocks_that_are_given_back_are_not_reserved_and_those_of_another_text_come_instead() -> None:
    engine, roles = small_engine(20)
    jobs = [request(roles, name, [3] * 9, 3) for name in ("a", "b")]
    for job in jobs:
        engine.add(job)
    engine.step()
    one, other = (job.sequences["base"] for job in jobs)
    pool = engine.runners["base"].pool
    one.reserved = 12
    held, free = len(set(one.block_table.ids) - set(other.block_table.ids)), pool.num_available
    assert one.take_from(other, 7) == 7
    assert one.reserved == 0
    assert pool.num_available == free + held, "the ones it had are free, but for those both have"
    one.release()
    assert (one.reserved, one.block_table.ids, pool.num_available) == (0, [], free + held)
    other.check()
