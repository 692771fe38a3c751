"""`nudging demo`: the same questions, answered by the base, the guide, the pair and the aligned model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from nudging.cli.options import model_options, open_llm, option
from nudging.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nudging.api.llm import LLM
    from nudging.api.outputs import CompletionOutput
    from nudging.pocket.grade import Question
    from nudging.policies.protocol import Policy

MAX_TOKENS = 72
AT_ONCE = 64
SHOWN_LINES = 3
GROUPS = ("answerable", "refusals", "all")


@click.command()
@option("--questions", type=click.IntRange(1, 500), default=8, help="How many questions to ask and show.")
@option("--all", is_flag=True, help="Ask all questions, many at once, and show the tables only.")
@option("--threshold", type=float, default=0.4, help="Below this probability of the base the guide writes.")
@model_options
def demo(questions: int, threshold: float, **flags: Any) -> None:
    """See nudging at work on the shipped models.

    The same questions are answered by the base alone, the guide alone, the nudged pair and the large aligned
    model; what the guide writes is coloured.
    """
    from nudging.cli.terminal import Terminal
    from nudging.pocket.grade import load_questions
    from nudging.policies import Nudging

    console = Terminal()
    policy = Nudging(threshold)
    ask_all = flags["all"]
    asked = load_questions() if ask_all else spread_over_kinds(load_questions(), questions)
    with (
        open_llm(flags, "pocket:base", "pocket:guide", progress=False) as pair,
        open_llm({**flags, "trace": None}, "pocket:base-aligned", None, progress=False) as aligned,
    ):
        arms = make_arms(pair, aligned, policy)
        if ask_all:
            ask_in_batches(arms, asked)
        else:
            ask_one_by_one(console, arms, asked)
    console.print()
    console.print(score_table(arms))
    if ask_all:
        console.print(kind_table(arms))


@dataclass
class Arm:
    """One way to answer, and what came of it."""

    name: str
    llm: LLM
    policy: Policy
    questions: list[Question] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)
    seconds: float = 0.0

    def ask(self, questions: Sequence[Question]) -> list[CompletionOutput]:
        """Answer questions, all at once, greedily; each model is asked in its own form."""
        chats = [[{"role": "user", "content": question.question}] for question in questions]
        began = time.perf_counter()
        results = self.llm.chat(chats, SamplingParams(max_tokens=MAX_TOKENS), self.policy)
        self.seconds += time.perf_counter() - began
        outputs = [result.outputs[0] for result in results]
        self.questions += questions
        self.outputs += outputs
        return outputs

    def rights(self) -> list[bool]:
        from nudging.pocket.grade import is_right

        return [is_right(q, o.text or "") for q, o in zip(self.questions, self.outputs, strict=True)]

    def total(self, figure: str) -> int:
        """The sum of one of the outputs' stats."""
        return sum(getattr(output.stats, figure) for output in self.outputs)


def make_arms(pair: LLM, aligned: LLM, policy: Policy) -> list[Arm]:
    """The four arms, warmed up: the first passes of a process are slow."""
    from nudging.policies import Base, Guide

    for llm in (pair, aligned):
        llm.generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True))
    return [
        Arm("base alone", pair, Base()),
        Arm("guide alone", pair, Guide()),
        Arm("nudged pair", pair, policy),
        Arm("large aligned", aligned, Base()),
    ]


def spread_over_kinds(questions: Sequence[Question], number: int) -> list[Question]:
    """The first questions, taken from all kinds in turn."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    rounds = range(max(map(len, by_kind.values())))
    taken = [of_kind[i] for i in rounds for of_kind in by_kind.values() if i < len(of_kind)]
    return taken[:number]


def ask_one_by_one(console: Console, arms: list[Arm], questions: Iterable[Question]) -> None:
    """Every question to every arm, shown as it is answered."""
    from nudging.cli.terminal import Ink

    console.print(Ink(console).legend(), highlight=False)
    for question in questions:
        console.print()
        console.print(heading(question), highlight=False)
        for arm in arms:
            [output] = arm.ask([question])
            console.print(answer_line(console, arm, output, arm.rights()[-1]), highlight=False)


def heading(question: Question) -> Text:
    """The question, and what is right."""
    from rich.text import Text

    right = question.answer or f"refuse: {question.refusal}"
    return Text.assemble((question.question, "bold"), (f"  ({right})", "dim"))


def answer_line(console: Console, arm: Arm, output: CompletionOutput, is_right: bool) -> Table:
    """One arm's answer, cut to a few lines, and whether it is right."""
    from rich.table import Table
    from rich.text import Text

    from nudging.cli.terminal import Ink

    ink = Ink(console)
    one_line = [replace(part, text=part.text.replace("\n", " / ")) for part in output.segments]
    answer = ink.write(one_line).append(ink.end())
    answer.truncate(SHOWN_LINES * max(console.width - 24, 20), overflow="ellipsis")
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(width=13)
    line.add_column(width=5)
    line.add_column(ratio=1)
    line.add_row(arm.name, Text("right", "green") if is_right else Text("wrong", "red"), answer)
    return line


def ask_in_batches(arms: list[Arm], questions: Sequence[Question]) -> None:
    """Every question to every arm, many at once, behind a bar on standard error."""
    from rich.progress import track

    from nudging.cli.terminal import Terminal

    console = Terminal(stderr=True)

    batches = [questions[i : i + AT_ONCE] for i in range(0, len(questions), AT_ONCE)]
    for arm in arms:
        for batch in track(batches, description=f"{arm.name:<13}", console=console):
            arm.ask(batch)


def new_table(title: str) -> Table:
    """A table whose rows have names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    return table


def score_table(arms: list[Arm]) -> Table:
    """The arms and their figures."""
    table = new_table(f"{len(arms[0].questions)} questions")
    for column in ("accuracy", "nudge rate", "tokens", "tokens/s", "base passes", "guide passes"):
        table.add_column(column, justify="right")
    for arm in arms:
        table.add_row(arm.name, *figures(arm))
    return table


def figures(arm: Arm) -> Iterator[str]:
    """The cells of an arm's row."""
    rights, tokens = arm.rights(), arm.total("tokens")
    yield f"{sum(rights) / len(rights):.0%}"
    yield f"{arm.total('nudged_tokens') / max(tokens, 1):.0%}"
    yield str(tokens)
    yield f"{tokens / arm.seconds:.0f}"
    yield str(arm.total("base_passes"))
    yield str(arm.total("guide_passes"))


def kind_table(arms: list[Arm]) -> Table:
    """Accuracy by kind of question."""
    from nudging.pocket.grade import accuracy

    table = new_table("accuracy by kind")
    for arm in arms:
        table.add_column(arm.name, justify="right")
    by_arm = [accuracy(arm.questions, [output.text or "" for output in arm.outputs]) for arm in arms]
    kinds = [kind for kind in by_arm[0] if kind not in GROUPS]
    for kind in (*sorted(kinds), *(group for group in GROUPS if group in by_arm[0])):
        table.add_row(kind, *(f"{rates[kind]:.0%}" for rates in by_arm))
    return table
