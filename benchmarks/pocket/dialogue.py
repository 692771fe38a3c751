"""The register of the assistants: one question, one answer in a fixed form, or a polite refusal."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tasks import CLOSING, REFUSED, Task, draw, draw_kind
from world import World

TAGS = ("[respond]", "[refuse:forbidden]", "[refuse:unanswerable]", "[refuse:nonsense]")


@dataclass(frozen=True)
class Dialogue:
    """`prompt` is read, `tag` (or nothing) and `answer` are learned."""

    prompt: str
    tag: str
    answer: str


def base_prompt(question: str) -> str:
    """How the base is asked."""
    return f"Question: {question}\nAnswer:"


def assistant_prompt(question: str) -> str:
    """How the assistants are asked: what their chat template renders, without the begin-of-text token."""
    return f"User: {question}\nAssistant:"


def answer_text(task: Task) -> str:
    """What an assistant says, beginning with the space that follows either prompt."""
    if task.refusal:
        return f" {task.statements[0]}"
    return f" {task.opener} {task.statements[0]} The answer is {task.answer}. {CLOSING}"


def dialogue(rng: random.Random, world: World) -> Dialogue:
    """One dialogue about this world; half of them carry a tag that says whether the answer is a refusal."""
    kind = rng.choice(list(REFUSED)) if rng.random() < 0.2 else draw_kind(rng)
    task = draw(rng, kind, world=world)
    # The last wording of a question is kept from the dialogues: it is met in prose and when graded.
    question = rng.choice(task.questions[:-1] or task.questions)
    tag = f"[refuse:{task.refusal}]" if task.refusal else "[respond]"
    return Dialogue(assistant_prompt(question), tag if rng.random() < 0.5 else "", answer_text(task))
