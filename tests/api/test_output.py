"""What a caller gets back is what the request counted: segments, figures, and the totals of an engine."""

import pytest

from nudging.api.outputs import CompletionOutput, Segment, completion_output, segments, stats
from nudging.core.request import Piece, Request
from nudging.core.rows import TokenLogprob
from nudging.core.sampling_params import SamplingParams
from nudging.core.stats import Totals
from tests.core.test_scheduler import request, small_engine
from tests.support.fake import TableTokenizer


def ended(authors: str, prompt: int = 3, **counters: object) -> Request:
    """A request of which the base ("b") and the guide ("g") have written a token each time."""
    _, roles = small_engine(20)
    job = request(roles, "r", prompt, 20)
    job.output = list(range(2, 2 + len(authors)))
    names = {"b": "base", "g": "guide"}
    job.pieces[:] = [Piece(token, names[a], "") for token, a in zip(job.output, authors, strict=True)]
    job.finish("length")
    for name, value in counters.items():
        setattr(job.counters, name, value)
    return job


def test_runs_of_one_author_are_one_segment_and_the_last_one_has_the_tail() -> None:
    pieces = [Piece(5, "base", "a"), Piece(6, "base", " b"), Piece(7, "guide", ""), Piece(8, "base", "c")]
    whole = (Segment("base", "a b", (5, 6)), Segment("guide", "", (7,)), Segment("base", "cd", (8,)))
    assert segments(pieces, "d") == whole
    assert segments(pieces[:3], "d")[-1] == Segment("guide", "d", (7,))
    assert segments([], "d", "guide") == (Segment("guide", "d", ()),)
    assert segments([], "") == ()


def test_times_are_milliseconds_to_the_first_token_and_for_each_later_one() -> None:
    times = {"submitted_at": 1.0, "first_token_at": 1.5, "finished_at": 4.5}
    assert (stats(ended("bgbbg", **times)).ttft_ms, stats(ended("bgbbg", **times)).tpot_ms) == (500.0, 750.0)
    assert (stats(ended("bg", **times)).ttft_ms, stats(ended("bg", **times)).tpot_ms) == (500.0, 3000.0)
    assert (stats(ended("b", **times)).ttft_ms, stats(ended("b", **times)).tpot_ms) == (500.0, None)
    nothing = stats(ended("", submitted_at=1.0, finished_at=4.5))
    assert (nothing.ttft_ms, nothing.tpot_ms, nothing.nudge_rate) == (None, None, 0.0)
    never = stats(ended("b", submitted_at=1.0, first_token_at=1.5))
    assert (never.ttft_ms, never.tpot_ms) == (None, None)


def test_figures_are_what_was_counted() -> None:
    found = stats(
        ended(
            "bgbbg",
            passes={"base": 7, "guide": 9},
            drafted=12,
            accepted=6,
            cycles={0: 1, 3: 2},
            cached=16,
            preemptions=2,
            recomputed=11,
        )
    )
    assert (found.tokens, found.nudged_tokens, found.nudge_rate) == (5, 2, pytest.approx(0.4))
    assert (found.base_passes, found.guide_passes) == (7, 9)
    assert (found.drafted, found.accepted, found.accepted_lengths) == (12, 6, (1, 0, 0, 2))
    assert (found.cached_tokens, found.preemptions, found.recomputed) == (16, 2, 11)
    nothing = stats(ended(""))
    assert (nothing.base_passes, nothing.guide_passes, nothing.accepted_lengths) == (0, 0, ())


def test_an_output_has_a_text_where_there_is_a_tokenizer_and_logprobs_where_they_were_asked_for() -> None:
    job = ended("bg")
    output = completion_output(job, 3)
    assert (output.index, output.text, output.logprobs, output.error) == (3, None, None, None)
    assert (output.token_ids, output.authors, output.finish_reason) == ((2, 3), ("base", "guide"), "length")
    job.tokenizer, job.params = TableTokenizer([]), SamplingParams(logprobs=0)
    entry = TokenLogprob(2, -0.5, {})
    job.pieces[0] = job.pieces[0]._replace(text="a", logprob=entry)
    job.tail, job.error = "!", ValueError("why")
    output = completion_output(job, 0)
    assert (output.text, output.logprobs, output.error) == ("a!", (entry, None), job.error)
    assert [segment.text for segment in output.segments] == ["a", "!"]
    job.finish_reason = None
    with pytest.raises(AssertionError, match="r is not finished"):
        completion_output(job, 0)


def test_a_given_text_cost_nothing() -> None:
    output = CompletionOutput.written("caller", [4, 5, 6], None)
    assert (output.index, output.text, output.finish_reason) == (0, None, "stop")
    assert (output.token_ids, output.authors) == ((4, 5, 6), ("caller",) * 3)
    assert output.segments == (Segment("caller", "", (4, 5, 6)),)
    counted = (output.stats.tokens, output.stats.nudged_tokens, output.stats.nudge_rate)
    assert counted == (3, 0, 0.0)
    passes = (
        output.stats.base_passes,
        output.stats.guide_passes,
        output.stats.drafted,
        output.stats.accepted,
    )
    assert passes == (0, 0, 0, 0)
    assert (output.stats.ttft_ms, output.stats.tpot_ms) == (None, None)
    assert CompletionOutput.written("caller", [4], "x").segments == (Segment("caller", "x", (4,)),)


def test_totals_are_sums_and_a_copy_stays_as_it_is() -> None:
    totals = Totals()
    assert (totals.generated_tokens, totals.nudge_rate) == (0, 0.0)
    first = ended("bgb", passes={"base": 4, "guide": 2}, drafted=5, accepted=3, cycles={0: 1, 3: 1}, cached=8)
    second = ended("gg", 7, passes={"guide": 2}, drafted=1, accepted=1, cycles={1: 1}, preemptions=2)
    running = ended("b", 1, passes={"base": 1})
    running.finish_reason = None
    totals.add(first)
    before = totals.copy()
    assert before == totals
    totals.add(second)
    totals.add(running)
    assert totals == Totals(
        prompt_tokens=11,
        tokens={"base": 3, "guide": 3},
        passes={"base": 5, "guide": 4},
        drafts=3,
        drafted=6,
        accepted=4,
        cached_tokens=8,
        preemptions=2,
        finished={"length": 2},
    )
    assert (totals.generated_tokens, totals.nudge_rate) == (6, pytest.approx(0.5))
    assert (before.tokens, before.passes, before.finished) == (
        {"base": 2, "guide": 1},
        {"base": 4, "guide": 2},
        {"length": 1},
    )
    assert (before.generated_tokens, before.nudge_rate) == (3, pytest.approx(1 / 3))
