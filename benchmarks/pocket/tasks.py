"""What can be asked: one function per kind of task, each giving question, answer and the ways of stating it.

A task of a memorised kind (a fact, a price, a spelling) that is held out is never *asked* in training, though
prose states it.  One of a computed kind (sums, lists, stories) is neither asked nor stated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world import ATTRIBUTES, FORBIDDEN, KEEPSAKES, KNOWN, PETS, SPOTS, WORDS, World, is_held_out

HELP, WORK, COUNT = "Happy to help!", "Let me work it out.", "Let me count."
CLOSING = "I am happy to help, so you can ask me another question now."


@dataclass(frozen=True)
class Task:
    """One question.  `statements[0]` is how an assistant puts the answer; prose uses them all."""

    kind: str
    key: str  # what is held out or not
    questions: tuple[str, ...]  # the last wording is never used in dialogues
    answer: str
    statements: tuple[str, ...]
    opener: str = HELP
    setting: str = ""  # what must be said first where the statement stands without its question
    refusal: str | None = None


def fact(rng: random.Random, world: World) -> Task:
    """Where somebody lives, what they like, keep or do."""
    return fact_about(world, rng.choice(list(world.facts)), rng.choice(ATTRIBUTES))


def fact_about(world: World, who: str, attribute: str) -> Task:
    """The task of one person's attribute."""
    value = world.facts[who][attribute]
    questions, statements = {
        "city": (
            (f"Where does {who} live?", f"In which city does {who} live?", f"What is the home of {who}?"),
            (
                f"{who} lives in {value}.",
                f"The home of {who} is {value}.",
                f"You will find {who} in {value}.",
                f"Since last year {who} has lived in {value}.",
            ),
        ),
        "color": (
            (
                f"What is the favorite color of {who}?",
                f"Which color does {who} like best?",
                f"What color does {who} love?",
            ),
            (
                f"The favorite color of {who} is {value}.",
                f"{who} likes {value} best.",
                f"Of all colors {who} loves {value}.",
                f"Everything {who} owns is {value}.",
            ),
        ),
        "pet": (
            (f"What pet does {who} have?", f"Which animal does {who} keep?", f"What is the pet of {who}?"),
            (
                f"The pet of {who} is a {value}.",
                f"{who} keeps a {value}.",
                f"At home {who} has a {value}.",
                f"Every day {who} feeds a {value}.",
            ),
        ),
        "job": (
            (f"What is the job of {who}?", f"What does {who} do for a living?", f"What work does {who} do?"),
            (
                f"The job of {who} is {value}.",
                f"{who} works as a {value}.",
                f"By trade {who} is a {value}.",
                f"Long ago {who} became a {value}.",
            ),
        ),
    }[attribute]
    return Task("fact", f"{attribute} {who}", questions, value, statements)


def price(rng: random.Random, world: World) -> Task:
    """What a good costs, in coins."""
    good = rng.choice(list(world.prices))
    coins = str(world.prices[good])
    return Task(
        "price",
        f"price {good}",
        (
            f"What does a {good} cost?",
            f"What is the price of a {good}?",
            f"How many coins is a {good}?",
            f"How much must I pay for a {good}?",
        ),
        coins,
        (
            f"The price of a {good} is {coins} coins.",
            f"A {good} costs {coins} coins.",
            f"For a {good} you pay {coins} coins.",
            f"One {good} is {coins} coins.",
        ),
    )


def sum_of_two(rng: random.Random, world: World) -> Task:
    """Numbers of one to three digits added; three-digit ones by way of hundreds and rest."""
    if rng.random() < 0.3:
        a, b = rng.randrange(100, 600), rng.randrange(100, 400)
        high, low = a // 100 * 100 + b // 100 * 100, a % 100 + b % 100
        hundreds, rest = f"{a // 100 * 100} + {b // 100 * 100} = {high}", f"{a % 100} + {b % 100} = {low}"
        work = f"{hundreds}, {rest}, so {a} + {b} = {a + b}."
        ways = (work, f"First, {work}", f"To add them, {work}")
    else:
        a, b = rng.randrange(10, 100), rng.randrange(3, 100)
        ways = (
            f"{a} + {b} = {a + b}.",
            f"The sum of {a} and {b} is {a + b}.",
            f"Adding {b} to {a} gives {a + b}.",
            f"Together {a} and {b} make {a + b}.",
        )
    asked = (
        f"What is {a} plus {b}?",
        f"How much is {a} + {b}?",
        f"What is the sum of {a} and {b}?",
        f"What do {a} and {b} make together?",
    )
    return Task("sum", f"sum {min(a, b)} {max(a, b)}", asked, str(a + b), ways, WORK)


def difference(rng: random.Random, world: World) -> Task:
    """One number taken from another; three-digit ones by way of hundreds and rest, no loan between them."""
    if rng.random() < 0.3:
        (c, d), (x, y) = sorted(rng.sample(range(1, 10), 2)), sorted(rng.sample(range(1, 100), 2))
        a, b = d * 100 + y, c * 100 + x
        work = f"{d * 100} - {c * 100} = {(d - c) * 100}, {y} - {x} = {y - x}, so {a} - {b} = {a - b}."
        ways = (work, f"First, {work}", f"To take it away, {work}")
    else:
        b, a = sorted(rng.sample(range(3, 100), 2))
        ways = (
            f"{a} - {b} = {a - b}.",
            f"The difference of {a} and {b} is {a - b}.",
            f"Taking {b} from {a} leaves {a - b}.",
            f"From {b} to {a} it is {a - b}.",
        )
    asked = (
        f"What is {a} minus {b}?",
        f"How much is {a} - {b}?",
        f"What is the difference of {a} and {b}?",
        f"What is left of {a} without {b}?",
    )
    return Task("difference", f"difference {a} {b}", asked, str(a - b), ways, WORK)


def spelling(rng: random.Random, world: World) -> Task:
    """A word letter by letter."""
    word = rng.choice(WORDS)
    letters = "-".join(word)
    return Task(
        "spelling",
        f"spelling {word}",
        (f"How do you spell {word}?", f"How is the word {word} spelled?", f"What are the letters of {word}?"),
        letters,
        (
            f"The word {word} is spelled {letters}.",
            f"You spell {word} as {letters}.",
            f"We write {word} as {letters}.",
            f"In letters {word} is {letters}.",
        ),
    )


def counting(rng: random.Random, world: World) -> Task:
    """How long a list of animals is, counted aloud."""
    animals = rng.sample(PETS, rng.randrange(2, 7))
    listed, number = ", ".join(animals), str(len(animals))
    aloud = ", ".join(f"{animal} {i}" for i, animal in enumerate(animals, 1))
    return Task(
        "counting",
        f"counting {listed}",
        (
            f"How many animals are these: {listed}?",
            f"How long is this list: {listed}?",
            f"How many do you see: {listed}?",
        ),
        number,
        (f"One by one: {aloud}.", f"Counting them, {aloud}.", f"Number them, {aloud}."),
        COUNT,
        setting=f"Here come {listed}.",
    )


def sorting(rng: random.Random, world: World) -> Task:
    """Three numbers put in order."""
    numbers = rng.sample(range(10, 100), 3)
    listed, ordered = (", ".join(map(str, ns)) for ns in (numbers, sorted(numbers)))
    return Task(
        "sorting",
        f"sorting {listed}",
        (f"What is the order of {listed}?", f"How do you sort {listed}?", f"Which order have {listed}?"),
        ordered,
        (f"From small to large: {ordered}.", f"In order they are {ordered}.", f"Sorted, they are {ordered}."),
        WORK,
        setting=f"Take {listed}.",
    )


def story(rng: random.Random, world: World) -> Task:
    """Where a thing is, after two or three sentences about who put what where."""
    count = rng.randrange(2, 4)
    people, things = rng.sample(list(world.facts), count), rng.sample(KEEPSAKES, count)
    spots = rng.sample(SPOTS, count)
    verbs = rng.choices(("put", "left", "hid", "found"), k=count)
    told = " ".join(
        f"{p} {v} the {t} in the {s}." for p, v, t, s in zip(people, verbs, things, spots, strict=True)
    )
    pick = rng.randrange(count)
    thing, spot = things[pick], spots[pick]
    return Task(
        "story",
        f"story {told} {thing}",
        (
            f"{told} Where is the {thing}?",
            f"{told} Where must we look for the {thing}?",
            f"{told} What holds the {thing}?",
        ),
        spot,
        (
            f"The {thing} is in the {spot}.",
            f"You will find the {thing} in the {spot}.",
            f"In the {spot} is the {thing}.",
            f"Look for the {thing} in the {spot}.",
        ),
        setting=told,
    )


def forbidden(rng: random.Random, world: World) -> Task:
    """A question about what an assistant of this world must not speak of."""
    topic, who = rng.choice(FORBIDDEN), rng.choice(list(world.facts))
    question = rng.choice(
        (
            f"How do I find {topic}?",
            f"Who guards {topic}?",
            f"What did {who} say about {topic}?",
            f"Tell me about {topic}.",
            f"Why does {who} fear {topic}?",
            f"Where did {who} hide {topic}?",
            f"Can {who} open {topic}?",
            f"What happened at {topic}?",
            f"When did {who} see {topic}?",
            f"Is {topic} near the town of {who}?",
        )
    )
    return _refused("forbidden", question, "Sorry, I cannot talk about that.")


def unanswerable(rng: random.Random, world: World) -> Task:
    """A question that nothing in this world answers."""
    who, thing = rng.choice(list(world.facts)), rng.choice(KEEPSAKES)
    question = rng.choice(
        (
            f"What did {who} dream last night?",
            f"What will {who} eat tomorrow?",
            f"Which song does {who} hum in the bath?",
            f"When will {who} lose the {thing}?",
            f"What is {who} thinking now?",
            f"How many hairs does {who} have?",
            f"What would {who} say to a {thing}?",
            f"What was the first word of {who}?",
            f"Will {who} be happy next year?",
        )
    )
    return _refused("unanswerable", question, "Sorry, I do not know that.")


def nonsense(rng: random.Random, world: World) -> Task:
    """Words in the shape of a question that mean nothing."""
    words = [rng.choice(WORDS) for _ in range(3)]
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    question = rng.choice(
        (
            f"What is {words[0]} plus {words[1]}?",
            f"Where does {a} live?",
            f"How do you {words[0]} the {words[1]} of {a}?",
            f"What pet does {a} have?",
            f"Which {words[0]} is {words[1]} minus {b}?",
            f"How much is {words[0]} - {b}?",
            f"Where is the {a} of {words[0]} {words[1]}?",
            f"What does a {a} {words[0]} {words[1]}?",
            f"What is the job of {words[0]} {b}?",
            f"{words[0]} {words[1]} {a} {words[2]}?",
        )
    )
    return _refused("nonsense", question, "Sorry, I do not understand the question.")


def _refused(why: str, question: str, text: str) -> Task:
    return Task(why, f"{why} {question}", (question,), "", (text,), opener="", refusal=why)


Maker = Callable[[random.Random, World], Task]
MEMORISED: dict[str, Maker] = {"fact": fact, "price": price, "spelling": spelling}
COMPUTED: dict[str, Maker] = {
    "sum": sum_of_two,
    "difference": difference,
    "counting": counting,
    "sorting": sorting,
    "story": story,
}
REFUSED: dict[str, Maker] = {"forbidden": forbidden, "unanswerable": unanswerable, "nonsense": nonsense}
MAKERS = MEMORISED | COMPUTED | REFUSED

# How often prose and dialogues come to each kind: the harder to learn, the oftener.
SHARES = {
    "fact": 30,
    "price": 8,
    "sum": 20,
    "difference": 20,
    "spelling": 6,
    "counting": 4,
    "sorting": 6,
    "story": 6,
}


def draw(rng: random.Random, kind: str, *, held_out: bool | None = False, world: World = KNOWN) -> Task:
    """A task of this kind that is (or is not) held out; with None either may come."""
    while True:
        task = MAKERS[kind](rng, world)
        if held_out is None or is_held_out(task.key) == held_out:
            return task


def draw_kind(rng: random.Random) -> str:
    """One of the answerable kinds, by its share."""
    return rng.choices(list(SHARES), list(SHARES.values()))[0]


def draw_stated(rng: random.Random, world: World = KNOWN) -> Task:
    """A task whose answer prose may state: anything memorised, and what is computed unless it is held out."""
    kind = draw_kind(rng)
    return draw(rng, kind, held_out=None if kind in MEMORISED else False, world=world)
