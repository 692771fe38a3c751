"""The READMEs' examples run and print what is shown; the README is short, links lead somewhere, lines fit."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = ("README.md", "engine/policies/README.md")
# Python, then what it prints where the page shows it.
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)
EXAMPLES = [
    pytest.param(*match.groups(), id=f"{name}:{number}")
    for name in SHOWN
    for number, match in enumerate(EXAMPLE.finditer((ROOT / name).read_text(encoding="utf-8")))
]
READMES = sorted(
    file.relative_to(ROOT)
    for folder in ("engine", "kernels", "csrc", "tests", "benchmarks")
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / folder).rglob("README.md")]
    # The models' cards are written by benchmarks/pocket/cards.py, for a hub's pages.
    if "pocket" not in file.parts
)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)\)")
WORDS, COLUMNS = 900, 120


@pytest.mark.parametrize(("code", "shown"), EXAMPLES)
def test_example_runs(code: str, shown: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README example", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    assert out.strip()
    if shown is not None:
        assert out == shown


def test_there_are_examples_with_their_output() -> None:
    assert len(EXAMPLES) >= 5
    assert sum(example.values[1] is not None for example in EXAMPLES) >= 2


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= WORDS


@pytest.mark.parametrize("name", dict.fromkeys(READMES), ids=str)
def test_links_lead_somewhere_and_lines_fit(name: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in LINK.findall(text):
        assert ((ROOT / name).parent / link).exists(), link
    # A row of a table cannot be broken.
    long = [line for line in text.splitlines() if len(line) > COLUMNS and not line.startswith("|")]
    assert not long
