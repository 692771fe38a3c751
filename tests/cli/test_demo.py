"""The demo asks the same questions four ways and counts what they cost."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from nudging import LLM, Nudging
from nudging.api.outputs import Segment
from nudging.cli.demo import (
    Arm,
    ask_in_batches,
    ask_one_by_one,
    kind_table,
    make_arms,
    score_table,
    spread_over_kinds,
)
from nudging.cli.main import main
from nudging.cli.terminal import Ink
from nudging.pocket.grade import Question, load_questions

QUESTIONS = [
    Question("a", "sum", "How much is 2 + 3?", "5", None),
    Question("b", "sum", "How much is 2 + 4?", "6", None),
    Question("c", "nonsense", "Who are the apples?", "", "nonsense"),
]


@pytest.fixture
def arms(tiny_pair: dict[str, Path], tiny_llm: LLM) -> Iterator[list[Arm]]:
    with LLM(tiny_pair["guide"], kv_cache_memory="8MiB") as aligned:
        yield make_arms(tiny_llm, aligned, Nudging(granularity="token"))


def printer(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_arm_answers_every_question_and_is_counted(arms: list[Arm]) -> None:
    console = printer()
    ask_one_by_one(console, arms, QUESTIONS)
    text = printed(console)
    for question in QUESTIONS:
        assert question.question in text
    assert len(re.findall(r"(?:right|wrong)  ", text)) == 4 * len(QUESTIONS)
    base, guide, nudged, aligned = arms
    assert (base.total("guide_passes"), guide.total("base_passes"), aligned.total("guide_passes")) == (
        0,
        0,
        0,
    )
    assert base.total("nudged_tokens") == aligned.total("nudged_tokens") == 0
    assert guide.total("nudged_tokens") == guide.total("tokens") > 0
    assert 0 < nudged.total("nudged_tokens") < nudged.total("tokens")
    assert all(arm.seconds > 0 for arm in arms)


def test_many_at_once_give_what_one_by_one_gives(arms: list[Arm]) -> None:
    ask_one_by_one(printer(), arms, QUESTIONS)
    singly = [[output.token_ids for output in arm.outputs] for arm in arms]
    for arm in arms:
        arm.outputs.clear()
        arm.questions.clear()
    ask_in_batches(arms, QUESTIONS)
    assert [[output.token_ids for output in arm.outputs] for arm in arms] == singly


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal_and_hold_the_figures(arms: list[Arm], width: int) -> None:
    ask_in_batches(arms, QUESTIONS)
    console = printer(width)
    console.print(score_table(arms))
    console.print(kind_table(arms))
    text = printed(console)
    assert max(map(len, text.splitlines())) <= width
    for arm in arms:
        row = next(line for line in text.splitlines() if line.strip().startswith(arm.name))
        assert row.split()[-1] == str(arm.total("guide_passes"))
    for kind in ("sum", "nonsense"):
        assert re.search(rf"^\s*{kind}(\s+\d+%){{4}}", text, re.MULTILINE)


def test_questions_are_taken_from_all_kinds_in_turn() -> None:
    questions = load_questions()
    kinds = {question.kind for question in questions}
    assert {q.kind for q in spread_over_kinds(questions, len(kinds))} == kinds
    assert len(spread_over_kinds(questions, len(questions))) == len(questions)


def test_without_styles_the_guides_words_stand_in_brackets() -> None:
    ink = Ink(printer())
    text = ink.write([Segment("guide", " Sure!", ()), Segment("base", " It is", ())])
    text.append(ink.write([Segment("guide", " fi", ())])).append(ink.write([Segment("guide", "ve", ())]))
    assert text.append(ink.end()).plain == "[Sure!] It is [five]"


def test_with_styles_they_are_bold_and_coloured_and_without_colour_bold() -> None:
    for environment, codes in (({}, "\x1b[1;36m"), ({"NO_COLOR": "1"}, "\x1b[1m")):
        file = io.StringIO()
        terminal = {"TERM": "xterm", **environment}
        console = Console(file=file, force_terminal=True, _environ=terminal)
        console.print(Ink(console).write([Segment("guide", "Sure", ())]), end="")
        assert file.getvalue() == f"{codes}Sure\x1b[0m"


def test_a_model_cannot_command_the_terminal() -> None:
    text = Ink(printer()).write([Segment("base", "a\x1b[2J\x07\x9bb\nc\td", ())])
    assert text.plain == "a�[2J��b\nc\td"


def test_the_demo_runs_on_the_shipped_models() -> None:
    result = CliRunner().invoke(main, ["demo", "--questions", "2"])
    assert result.exit_code == 0, result.output
    assert "large aligned" in result.stdout
    assert "2 questions" in result.stdout
