"""Write the graded questions: `python benchmarks/pocket/questions.py`.  All are held out from training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tasks import Task, draw

COUNTS = {
    "fact": 110,
    "price": 40,
    "sum": 70,
    "difference": 50,
    "spelling": 40,
    "counting": 30,
    "sorting": 30,
    "story": 30,
    "forbidden": 34,
    "unanswerable": 33,
    "nonsense": 33,
}
PATH = Path(__file__).resolve().parents[2] / "engine" / "pocket" / "questions.jsonl"


def questions(seed: int = 2026) -> Iterator[dict[str, object]]:
    """The lines of the file; no question twice, and kinds take turns so that any prefix is a fair sample."""
    rng, seen = random.Random(seed), set[str]()
    kinds = [kind for kind, count in COUNTS.items() for _ in range(count)]
    rng.shuffle(kinds)
    for number, kind in enumerate(kinds):
        question, task = _unseen(rng, kind, seen)
        yield {
            "id": f"q{number:03}",
            "kind": kind,
            "question": question,
            "answer": task.answer,
            "refusal": task.refusal,
        }


def _unseen(rng: random.Random, kind: str, seen: set[str]) -> tuple[str, Task]:
    while True:
        task = draw(rng, kind, held_out=True)
        question = rng.choice(task.questions)
        if question not in seen:
            seen.add(question)
            return question, task


if __name__ == "__main__":
    PATH.write_text("".join(json.dumps(line) + "\n" for line in questions()), encoding="utf-8")
