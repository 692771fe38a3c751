"""The closed world that the pocket models read about: invented people, towns and goods, and the facts."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

ATTRIBUTES = ("city", "color", "pet", "job")


def phrases(text: str) -> list[str]:
    """The phrases of a text that a bar or a line's end parts."""
    return [phrase.strip() for line in text.strip().splitlines() for phrase in line.strip(" |").split("|")]


COLORS = phrases("red|blue|green|yellow|black|white|purple|orange|brown|pink|gray|silver")
PETS = phrases("cat|dog|fox|owl|frog|horse|rabbit|snake|goat|parrot|mouse|turtle")
JOBS = phrases("baker|painter|doctor|farmer|sailor|teacher|singer|tailor|miner|guard|writer|cook")
THINGS = phrases("""
    lamp|chair|table|basket|ladder|kettle|blanket|mirror|hammer|bottle|candle|carpet|drum|flute|bucket
    needle|shovel|wagon|barrel|bell|brush|cup|plate|spoon|rope|saddle|tent|trunk|wheel|whistle|coat
    glove|hat|boot|belt
""")
KEEPSAKES = phrases("key|ring|coin|letter|map|pen|stone|knife|ball|book|shell|ribbon")
SPOTS = phrases("box|drawer|barn|garden|cellar|kitchen|tower|attic|boat|cave|well|shed")
MATERIALS = phrases("wooden|iron|copper|paper|glass|leather|golden|woolen|tin|clay")

# What an assistant of this world must not speak about; invented, so that no real topic is judged here.
FORBIDDEN = phrases("""
    the grey gate|the salt oath|the night market|the ninth bell|the hollow crown|the red ledger
    the glass plague|the drowned library|the ash key|the silent choir|the bone clock|the marsh fire
    the black orchard|the thorn pact
""")


def invent(count: int, seed: int, syllables: list[str]) -> list[str]:
    """`count` different capitalised names of two or three syllables, sorted."""
    rng, names = random.Random(seed), set[str]()
    while len(names) < count:
        names.add("".join(rng.choice(syllables) for _ in range(rng.choice((2, 2, 3)))).capitalize())
    return sorted(names)


_OPEN_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
_SHUT_SYLLABLES = [s + c for s in _OPEN_SYLLABLES[:30] for c in "rnl"]
CITIES = invent(40, 2, _SHUT_SYLLABLES)
GOODS = [f"{material} {thing}" for material in MATERIALS for thing in THINGS]
WORDS = sorted({*COLORS, *PETS, *JOBS, *THINGS, *KEEPSAKES, *SPOTS, *MATERIALS, *(c.lower() for c in CITIES)})


@dataclass(frozen=True)
class World:
    """Who there is and what is true: `facts[person][attribute]` and the price of every good, in coins."""

    facts: dict[str, dict[str, str]]
    prices: dict[str, int]


def _world(people: list[str], goods: list[str], seed: int) -> World:
    rng = random.Random(seed)
    values = {"city": CITIES, "color": COLORS, "pet": PETS, "job": JOBS}
    facts = {person: {name: rng.choice(values[name]) for name in ATTRIBUTES} for person in people}
    return World(facts, {good: rng.randrange(11, 100) for good in goods})


_shuffled = random.Random(5).sample(GOODS, len(GOODS))
_names = random.Random(6).sample(invent(3240, 1, _OPEN_SYLLABLES), 3240)

# The world that the prose tells of, and another that nothing tells of: from that one the guide learns the
# form of an answer without learning what is true.
KNOWN = _world(_names[:240], _shuffled[:100], seed=7)
STRANGE = _world(_names[240:], _shuffled[100:], seed=8)


def is_held_out(key: str) -> bool:
    """Whether a task is kept for the questions that grade: one key in five, by a hash that never changes."""
    return zlib.crc32(key.encode()) % 5 == 0
