"""The glossary of engine/README.md: at most 40 words, each with a name that is in the code."""

import importlib
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "engine" / "README.md"
TABLE = README.read_text(encoding="utf-8").partition("## Words")[2].partition("\n## ")[0]
ENTRIES = re.findall(r"^\| ([^|`]+) \| `([\w.]+)` \| [^|]+ \|$", TABLE, flags=re.MULTILINE)
MOST = 40


def test_the_glossary_is_short_and_a_word_stands_once() -> None:
    words = [word for word, _ in ENTRIES]
    assert len(ENTRIES) == TABLE.count("\n|") - 2, "each row has a word, a name and a meaning"
    assert 20 <= len(words) == len(set(words)) <= MOST
    assert not {word for word in words if word in ("lane", "track", "foresight")}


@pytest.mark.parametrize(("word", "name"), ENTRIES)
def test_a_name_of_the_glossary_is_in_the_code(word: str, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(f"nudging.{module}"), attribute), word
