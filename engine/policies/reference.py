"""The authors' released nudging client, at the level of text, kept for parity with its published results.

Every call continues prompt + text, tokenised afresh.  The guide begins, block by block of 16 tokens; the
base takes over at the first word where it agrees with the guide or is sure; it is heard until it is
unsure; then the guide begins again.  Only the guide's end of sequence ends the text.  The repetition
heuristics are the client's own. Lengths are counted with the base's tokenizer (the client uses one of a
third model), and `max_tokens` is checked where the client checks it: between rounds, so that its texts may
be longer by up to two blocks.  They are cut at `max_tokens`, unless the policy is asked to overshoot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nudging.policies.protocol import Completion, Step, View

BLOCK = 16
MAX_ROUNDS = 150
MAX_SAME_NUDGES = 3
LONG_RUN_WORDS = 5
MIN_REPEAT_CHARS = 30

Unsure = Callable[[float], bool]


@dataclass(frozen=True)
class State:
    """Where the client stands between two calls.

    `texts` is what was written, with its authors; `words` and `word` are the guide's block and the word
    that is being checked (None outside a block); `run` is what the base has written since it took over.
    """

    texts: tuple[tuple[str, str], ...] = ()
    last_nudge: str = ""
    same_nudges: int = 0
    rounds: int = 0
    lead: str = ""
    words: tuple[str, ...] | None = None
    word: int = 0
    run: str = ""
    run_open: bool = False

    @property
    def out(self) -> str:
        return "".join(text for _, text in self.texts)


START = State()


def step(view: View, state: State, unsure: Unsure) -> Step:
    """One call to one model, folded into the state; the texts are written when the client ends."""
    if state.run_open:
        return _base_run(view, state, unsure, None)
    if state.words is not None:
        return _check_word(view, state, unsure)
    return _guide_block(view, state)


def _guide_block(view: View, state: State) -> Step:
    """Ask the guide for a block; an end of sequence inside it ends the text with the whole block."""
    if view.count_tokens(state.out) >= view.max_tokens or state.rounds >= MAX_ROUNDS:
        return _end(state, "length")
    block = view.complete("guide", state.out, BLOCK)
    if block.finish == "stop":
        return _end(replace(state, texts=(*state.texts, ("guide", block.text))), "stop")
    bare = block.text.lstrip(" ")
    words = tuple(bare.split(" "))
    lead = block.text[: len(block.text) - len(bare)]
    word = 0 if len(words) > 1 else 1
    return Step(state=replace(state, rounds=state.rounds + 1, lead=lead, words=words, word=word))


def _check_word(view: View, state: State, unsure: Unsure) -> Step:
    """Does the base take over at the next word of the block?  Word 0 is the guide's in any case."""
    assert state.words is not None
    if state.word >= len(state.words) - 1:
        return _nudge(state, state.word)
    word = state.word + 1
    if state.words[word] == "":
        return Step(state=replace(state, word=word))
    nudge = state.lead + " ".join(state.words[:word])
    said = view.complete("base", state.out + nudge, 1)
    agrees = (" " + state.words[word]).startswith(said.pieces[0])
    if not agrees and unsure(said.top_probs[0]):
        return Step(state=replace(state, word=word))
    run = view.complete("base", state.out + nudge, BLOCK)
    taken = _nudge(state, word)
    # An empty run is the base's wish to end, which the client does not hear.
    if taken.finish or run.text == "":
        return taken
    return _base_run(view, replace(taken.state, run=run.pieces[0], run_open=True), unsure, run)


def _nudge(state: State, word: int) -> Step:
    """Write the guide's words before `word`; the same words four times in a row end the text."""
    assert state.words is not None
    nudge = state.lead + " ".join(state.words[:word])
    same = state.same_nudges + 1 if nudge == state.last_nudge else 0
    if same >= MAX_SAME_NUDGES:
        return _end(state, "stop")
    texts = (*state.texts, ("guide", nudge))
    return Step(state=replace(state, texts=texts, last_nudge=nudge, same_nudges=same, words=None))


def _base_run(view: View, state: State, unsure: Unsure, first: Completion | None) -> Step:
    """Follow the base until it is unsure, ends, repeats itself or the length is reached."""
    if view.count_tokens(state.run) >= view.max_tokens - view.count_tokens(state.out):
        return _close_run(state)
    if first is not None:
        # The client does not look whether this completion ended: it asks once more.
        finish, pieces, probs = "length", first.pieces[1:], first.top_probs[1:]
    else:
        more = view.complete("base", state.out + state.run, BLOCK)
        finish, pieces, probs = more.finish, more.pieces, more.top_probs
    if "".join(pieces) in state.run:
        return _close_run(state)
    stop = next((i for i, prob in enumerate(probs) if unsure(prob)), None)
    new = "".join(pieces[:stop])
    if len(new.split(" ")) > LONG_RUN_WORDS and new in state.out + state.run:
        return _close_run(state)
    state = replace(state, run=state.run + new)
    return _close_run(state) if stop is not None or finish == "stop" else Step(state=state)


def _close_run(state: State) -> Step:
    return Step(state=replace(state, texts=(*state.texts, ("base", state.run)), run="", run_open=False))


def _end(state: State, finish: str) -> Step:
    """Strip the text, remove what repeats at its end, and cut the authors' pieces alike."""
    text = state.out
    start = len(text) - len(text.lstrip())
    end = start + len(without_repeated_suffix(text.strip()))
    texts = []
    at = 0
    for author, piece in state.texts:
        kept = piece[max(start - at, 0) : max(end - at, 0)]
        at += len(piece)
        if kept:
            texts.append((author, kept))
    return Step(texts=tuple(texts), state=state, finish=finish)


def without_repeated_suffix(text: str) -> str:
    """`text` without the blocks of at least 30 characters that repeat at its end."""
    while size := _repeated_suffix(text):
        text = text[:-size]
    return text


def _repeated_suffix(text: str) -> int:
    """The length of a suffix that stands twice in a row, as the client's binary search finds it, else 0."""
    low, high, found = 0, len(text), 0
    while low <= high:
        size = (low + high) // 2
        if size >= MIN_REPEAT_CHARS and text[:-size].endswith(text[-size:]):
            found, low = size, size + 1
        else:
            high = size - 1
    return found
