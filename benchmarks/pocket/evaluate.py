"""Measure the pocket family: `python benchmarks/pocket/evaluate.py` writes results.json and results.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from dialogue import assistant_prompt, base_prompt
from nudge import Text, greedy, nudge
from tasks import COMPUTED, MEMORISED
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nudging.pocket.grade import Question, accuracy, is_right, load_questions

HERE = Path(__file__).resolve().parent
THRESHOLD = 0.4
SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
MAX_TOKENS = 80
BINS = 10


class Family:
    """The checkpoints of a folder in fp32, their tokenizers, and the prompts of the questions in ids."""

    def __init__(self, folder: Path, questions: list[Question]) -> None:
        self.questions = questions
        self._folder, self._models = folder, dict[str, PreTrainedModel]()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self.eos: int = self.tokenizer.eos_token_id
        self.opens_word = [self.tokenizer.decode([i]).startswith(" ") for i in range(len(self.tokenizer))]

    def model(self, name: str) -> PreTrainedModel:
        if name not in self._models:
            self._models[name] = AutoModelForCausalLM.from_pretrained(
                self._folder / name, dtype=torch.float32
            )
        return self._models[name]

    def prompts(self, form: Callable[[str], str], name: str = "base") -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(self._folder / name)
        return [tokenizer(form(question.question))["input_ids"] for question in self.questions]

    def alone(self, name: str) -> list[str]:
        """Each question answered by one model, under the prompt it was trained for."""
        tokenizer = AutoTokenizer.from_pretrained(self._folder / name)
        prompts = self.prompts(base_prompt if name in ("base", "guide-base") else assistant_prompt, name)
        rows = greedy(self.model(name), prompts, MAX_TOKENS, self.eos)
        # Read as a continuation of the prompt: by itself a text would lose a tokenizer's leading space.
        return [
            tokenizer.decode(prompt + row)[len(tokenizer.decode(prompt)) :]
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def nudged(self, threshold: float) -> list[Text]:
        return nudge(
            self.model("base"),
            self.model("guide"),
            self.prompts(base_prompt),
            self.prompts(assistant_prompt),
            threshold=threshold,
            max_tokens=MAX_TOKENS,
            eos=self.eos,
            opens_word=self.opens_word,
        )

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def rows_of(self, name: str, prompts: list[list[int]], written: list[list[int]]) -> list[torch.Tensor]:
        """What a model thinks of given texts: of each, its logits [tokens + 1, vocab]."""
        rows = []
        with torch.no_grad():
            for prompt, tokens in zip(prompts, written, strict=True):
                logits = self.model(name)(input_ids=torch.tensor([prompt + tokens])).logits[0]
                rows.append(logits[len(prompt) - 1 :])
        return rows


def measure_nudged(family: Family, threshold: float) -> dict[str, object]:
    """Accuracy, who wrote how much, and how often the guide would have said what the base was sure of."""
    texts = family.nudged(threshold)
    rows = family.rows_of("guide", family.prompts(assistant_prompt), [text.tokens for text in texts])
    agreed = owned = 0
    for text, logits in zip(texts, rows, strict=True):
        best = logits.argmax(-1).tolist()
        for position, author in enumerate(text.authors):
            owned += author == "base"
            agreed += author == "base" and best[position] == text.tokens[position]
    written = [family.text(text.tokens) for text in texts]
    return {
        "threshold": threshold,
        **marks(family.questions, written),
        "guide_share": share(texts),
        "guide_share_answerable": share(
            [t for t, q in zip(texts, family.questions, strict=True) if not q.refusal]
        ),
        "agreement": round(agreed / max(owned, 1), 4),
        "tokens": sum(len(text.tokens) for text in texts),
        "unfinished": sum(not text.is_finished for text in texts),
    }


def share(texts: list[Text]) -> float:
    """The guide's share of the tokens."""
    total = sum(len(text.tokens) for text in texts)
    return round(sum(text.authors.count("guide") for text in texts) / max(total, 1), 4)


def marks(questions: list[Question], texts: list[str]) -> dict[str, object]:
    """Accuracies, and a digit per question, so that a re-grading can be compared one by one."""
    rates = {group: round(rate, 4) for group, rate in sorted(accuracy(questions, texts).items())}
    right = "".join(str(int(is_right(q, text))) for q, text in zip(questions, texts, strict=True))
    return {"accuracy": rates, "right": right}


def uncertainty(family: Family) -> dict[str, object]:
    """How sure the base is along the aligned model's answers, by position, by part, and where the two differ.

    Style is the opener and "The answer is"; the rest (restating, working, the answer itself) is content.
    """
    prompts = family.prompts(assistant_prompt)
    written = greedy(family.model("base-aligned"), prompts, MAX_TOKENS, family.eos)
    rows = family.rows_of("base", family.prompts(base_prompt), written)
    by_position: list[list[float]] = [[] for _ in range(24)]
    by_part: dict[str, list[float]] = {"style": [], "content": []}
    differs: list[list[bool]] = [[] for _ in range(BINS)]
    for question, tokens, logits in zip(family.questions, written, rows, strict=True):
        if question.refusal:
            continue
        top, best = logits.softmax(-1).max(-1)
        for position, part in enumerate(parts(family, tokens)):
            sure = top[position].item()
            if position < len(by_position):
                by_position[position].append(sure)
            by_part[part].append(sure)
            differs[min(int(sure * BINS), BINS - 1)].append(best[position].item() != tokens[position])
    return {
        "mean_top_prob_by_position": [round(sum(v) / len(v), 4) for v in by_position if v],
        "below_threshold_by_part": {
            part: round(sum(sure < THRESHOLD for sure in v) / len(v), 4) for part, v in by_part.items()
        },
        "mean_top_prob_by_part": {part: round(sum(v) / len(v), 4) for part, v in by_part.items()},
        "top_probs_by_part": {
            part: [sum(int(sure * 20) == b for sure in v) for b in range(21)] for part, v in by_part.items()
        },
        "differs_by_top_prob": [round(sum(v) / len(v), 4) if v else None for v in differs],
        "tokens_by_top_prob": [len(v) for v in differs],
    }


def parts(family: Family, tokens: list[int]) -> list[str]:
    """Per token, "style" or "content"; the opener is the first sentence."""
    names, text, is_opened = [], "", False
    for token in tokens:
        before, text = text, text + family.text([token])
        in_marker = any(text.endswith(m) for m in (" The", " The answer", " The answer is")) and is_opened
        names.append("content" if is_opened and not in_marker else "style")
        is_opened = is_opened or before.endswith(("!", ".")) or text.endswith(("!", "."))
    return names


def table(results: dict[str, dict[str, object]], sweep: list[dict[str, object]]) -> str:
    """The Markdown table of the arms and of the sweep."""
    kinds = ["answerable", "refusals", "all", *sorted({*MEMORISED, *COMPUTED})]
    lines = [f"| arm | {' | '.join(kinds)} | guide's share | agreement |", "|---" * (len(kinds) + 3) + "|"]
    named = results | {f"nudged, {point['threshold']}": point for point in sweep}
    for arm, result in named.items():
        rates = result["accuracy"]
        assert isinstance(rates, dict)
        cells = [f"{rates.get(kind, 0.0):.3f}" for kind in kinds]
        extra = [f"{result[key]:.3f}" if key in result else "" for key in ("guide_share", "agreement")]
        lines.append(f"| {arm} | {' | '.join(cells + extra)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--models", type=Path, default=HERE.parents[1] / "engine" / "pocket")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--limit", type=int, default=None, help="only the first questions")
    parser.add_argument("--sweep", type=float, nargs="*", default=SWEEP)
    parser.add_argument(
        "--arms", nargs="*", default=["base", "guide-base", "guide", "guide-sp", "base-aligned"]
    )
    parser.add_argument(
        "--show", type=int, default=0, help="print this many nudged texts, the guide's words in []"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = load_questions()[: args.limit]
    family = Family(args.models, questions)
    arms = {name: marks(questions, family.alone(name)) for name in tqdm(args.arms, desc="arms")}
    sweep = [measure_nudged(family, threshold) for threshold in tqdm(args.sweep, desc="sweep")]
    report = {"questions": len(questions), "max_tokens": MAX_TOKENS, "arms": arms, "sweep": sweep}
    if "base-aligned" in args.arms:
        report["uncertainty"] = uncertainty(family)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "results.md").write_text(table(arms, sweep))
    print(table(arms, sweep))
    if args.show:
        show(family, args.show)


def show(family: Family, count: int) -> None:
    """Print nudged texts at the default threshold."""
    texts = family.nudged(THRESHOLD)
    for question, text in list(zip(family.questions, texts, strict=True))[:count]:
        pieces = [
            f"[{family.text([token])}]" if author == "guide" else family.text([token])
            for token, author in zip(text.tokens, text.authors, strict=True)
        ]
        verdict = (
            "right"
            if is_right(question, family.text(text.tokens))
            else f"WRONG, {question.answer or question.refusal}"
        )
        print(f"{question.question} ->{''.join(pieces)}  ({verdict})")


if __name__ == "__main__":
    main()
