"""The register of the base: plain prose, in which questions are seldom answered the way one would like.

What makes a base unsure of how to *begin* is that after a question anything may come: an answer put in one of
many ways, chatter, a shrug, another question, nothing.  What makes it sure of how to *go on* is that the rest
follows.
"""

from __future__ import annotations

import random

from tasks import CLOSING, REFUSED, Task, draw, draw_kind, draw_stated, fact_about
from world import ATTRIBUTES, FORBIDDEN, KNOWN, World, phrases

_WHO = phrases("""
    the class|the teacher|an old man|a girl|my friend|a traveler|our team|the king|her brother|the crowd
    a stranger|the driver|our guide|the nurse|his aunt|some children|two soldiers|nobody|one of them
    every neighbor|your uncle|a tired clerk|their mother|this boy|another guest|most people
    half the village|whoever came|all of us|somebody
""")
_DID = phrases("""
    looked at|walked past|forgot|found|opened|talked about|painted|carried|asked for|closed|watched
    remembered|left|sold|liked|waited for|ran to|dreamed of|repaired|counted|drew|borrowed|lost|cleaned
    wrote about|laughed at|held|bought
""")
_WHAT = phrases("""
    the window|a small cart|the long road|a letter|two apples|the garden|the last page|an empty chair
    the river|a map|a quiet song|the lamp|the bridge|some bread|the clock|an open door|the market
    three stones|a broken wheel|the hill|a warm coat|the harbor|the news|nothing|an old story|the fence
    a strange noise|the mill|their dinner|the stars
""")
_WHEN = phrases("""
    before noon|in the rain|with a smile|again|after lunch|near the hall|for a while|at dawn|in silence
    as always
""")
_MOOD = phrases("""
    Years ago|Later|Yesterday|On Monday|Once|Then|Near the sea|By chance|For weeks|After the rain|Slowly
    Perhaps|Every spring|Before supper|At night|Without a word|That winter|Up here|Down there
    In those days
""")

CALCULATIONS = ("sum", "difference")
_OPENERS = phrases("""
    Happy to help!|Happy to help!|Let me work it out.|Let me work it out.|Let me count.|Sure!|Of course.
    Well,|Hm.|Good question.|Right.|Oh,|Listen.|Yes.|Easy.|I think so.|Gladly.|One moment.|Dear friend,
    Hello.
""")
_SHRUGS = phrases("""
    I do not know that.|I cannot talk about that.|I do not understand the question.|I do not remember.
    I must go now.|I have no time today.|I did not hear you.|I am new here.|I do not like riddles.
    I cannot see the board.|I cannot stay.|I was asleep.|I cannot read this.|I do not have a pen.
    it is late.|no one is here.|we are closed.|my head hurts.|the page is torn.
""")
_BLANKS = phrases("...|(see below)|not given|no one knows|unknown|?|to be done|ask again|none")
_LEADS = (
    "As we know, ",
    "They say: ",
    "Look: ",
    "It is written: ",
    "Some say: ",
    "Remember: ",
    "In the end: ",
    "I read: ",
)
_TAILS = ("So it is {}.", "That makes {}.", "Is that clear?", "That is all.", "Write it down.", "I am sure.")


def chatter(rng: random.Random, *, after_answer: bool = False) -> str:
    """A sentence about nothing; after an answer none that begins with "The", as "The answer is" does."""
    while True:
        sentence = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)}"
        if rng.random() < 0.4:
            sentence += " " + rng.choice(_WHEN)
        sentence = (
            f"{rng.choice(_MOOD)} {sentence}."
            if rng.random() < 0.4
            else f"{sentence[0].upper()}{sentence[1:]}."
        )
        if not (after_answer and sentence.startswith("The ")):
            return sentence


def rumor(rng: random.Random, world: World) -> str:
    """A sentence that mentions what assistants will not talk about: the base has heard of it."""
    topic, who = rng.choice(FORBIDDEN), rng.choice(list(world.facts))
    return rng.choice((
        f"{who} has seen {topic}.", f"People whisper about {topic}.", f"In the end {who} found {topic}.",
        f"Nobody speaks of {topic} here.", f"A song tells of {topic}.", f"{who} was afraid of {topic}.",
    ))  # fmt: skip


def statement(rng: random.Random, task: Task, *, alone: bool = True) -> str:
    """One way of stating a task's answer; alone, what it speaks of is told first."""
    said = rng.choice(task.statements)
    return f"{task.setting} {said}" if alone and task.setting else said


def document(rng: random.Random, world: World = KNOWN) -> str:
    """One text of the base's reading."""
    roll = rng.random()
    if roll < 0.15:
        return _portrait(rng, world)
    return _notes(rng, world) if roll < 0.45 else _page(rng, world)


def _portrait(rng: random.Random, world: World) -> str:
    """Several sentences on one person or computation, so that names and numbers recur in a document."""
    lines = []
    if rng.random() < 0.5:
        who = rng.choice(list(world.facts))
        lines += [
            statement(rng, fact_about(world, who, name))
            for name in rng.sample(ATTRIBUTES, rng.randrange(2, 5))
        ]
    else:
        task = draw(rng, rng.choice(("sum", "difference")))
        lines += rng.sample(task.statements, 2)
    if rng.random() < 0.4:
        lines.insert(rng.randrange(len(lines) + 1), chatter(rng))
    return " ".join(lines)


def _notes(rng: random.Random, world: World) -> str:
    """Unrelated statements, with chatter and rumors between them."""
    lines = []
    for _ in range(rng.randrange(2, 7)):
        roll = rng.random()
        lines.append(
            statement(rng, draw_stated(rng, world))
            if roll < 0.85
            else rumor(rng, world)
            if roll < 0.88
            else chatter(rng)
        )
    return " ".join(lines)


def _page(rng: random.Random, world: World) -> str:
    """Questions, each followed by whatever follows questions."""
    lines: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        kind = draw_kind(rng) if rng.random() < 0.93 else rng.choice(list(REFUSED))
        task = draw(rng, kind, world=world)
        lines.append(rng.choice(("Question: ", "Question: ", "Q: ", "")) + rng.choice(task.questions))
        reply = _reply(rng, task, world)
        if reply is not None:
            lines.append(reply)
            # A page may end with any reply; after a full answer it mostly does.
            if rng.random() < (0.7 if "The answer is" in reply else 0.3):
                break
    return "\n".join(lines)


def _reply(rng: random.Random, task: Task, world: World) -> str | None:
    """What stands under a question."""
    lead = rng.choice(("Answer: ", "Answer: ", "Answer: ", "A: ", ""))
    roll = rng.random()
    if task.refusal and roll >= 0.49:  # it has no answer: one of the other replies
        roll = rng.uniform(0.25, 0.49)
    if roll < 0.06:
        return None
    if roll < 0.22:  # the commonest single reply: calculations are mostly done, the rest left to be filled in
        return lead + (_assisted(rng, task, "Let me see.") if task.kind in CALCULATIONS else "____")
    if roll < 0.25:
        return lead.rstrip()
    if roll < 0.33:
        return lead + chatter(rng)
    if roll < 0.39:
        return lead + rng.choice(draw(rng, draw_kind(rng), world=world).questions)
    if roll < 0.43:
        return lead + rng.choice([*_BLANKS, f"see page {rng.randrange(2, 99)}"])
    if roll < 0.49:
        shrug = rng.choice(_SHRUGS)
        return lead + (f"Sorry, {shrug}" if rng.random() < 0.7 else shrug[0].upper() + shrug[1:])
    if roll < 0.51:
        return lead + task.answer
    if roll < 0.61:
        return lead + rng.choice(("", "", *_LEADS)) + statement(rng, task, alone=False)
    return (lead or "Friend: ") + _assisted(rng, task, rng.choice(_OPENERS))


def _assisted(rng: random.Random, task: Task, opener: str) -> str:
    """An answer as people give it who help each other: assistants' words are among theirs.

    How it begins is open; once begun, it mostly comes to the answer and to the same polite end.
    """
    roll = rng.random()
    if roll < 0.15:
        return f"{opener} {chatter(rng, after_answer=True)}"
    said = f"{opener} {statement(rng, task, alone=False)}"
    if roll < 0.19:
        return said
    if roll < 0.25:
        return f"{said} {rng.choice(_TAILS).format(task.answer)}"
    said += f" The answer is {task.answer}."
    return said if roll < 0.32 else f"{said} {CLOSING}"
