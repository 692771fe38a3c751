"""Token ids become text as they arrive, and stop strings end it: what is handed out is never taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nudging.errors import BadRequest
from nudging.text.tokenizer import Tokenizer


class Detokenizer:
    """Running text, token by token: what comes out is, joined, `Tokenizer.text_of` of what went in.

    What is given out is final.  Bytes that may yet become a character are held back; bytes that never can are
    U+FFFD, as many as `bytes.decode("utf-8", "replace")` makes of the whole.  The first token's leading space
    stays, because generated text goes on where the prompt ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """`skip_special_tokens` False: they are written out, as their names."""
        self._bytes_of = tokenizer.token_bytes if skip_special_tokens else tokenizer.shown_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes; none for special tokens that are skipped."""
        return self.push_bytes(self._bytes_of(token))

    @property
    def held(self) -> bytes:
        """The bytes of a character that is not whole yet."""
        return self._decoder.getstate()[0]

    def push_bytes(self, data: bytes) -> str:
        """The characters that `data` completes, for text that another tokenizer's model wrote."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the next push starts a new text."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Cuts a text before the stop string that is complete first; of several at one character, the longest.

    So the cut depends on the text alone, not on the pieces it arrives in.  Held back is the longest end of
    the text that may still become a stop string.
    """

    def __init__(self, stop: Sequence[str], is_kept: bool = False) -> None:
        """`is_kept`: the cut is behind the stop string.  BadRequest: an empty one, which every text holds at
        once.
        """
        if "" in stop:
            raise BadRequest(
                f"stop strings {list(stop)!r} hold an empty one; every text would end at once, remove it"
            )
        self._stops = tuple(stop)
        self._borders = tuple(map(_borders, self._stops))
        self._matched = [0] * len(self._stops)  # how much of each stop string the text so far ends with
        self._held = ""
        self._is_kept = is_kept
        self.found: str | None = None

    def push(self, text: str, may_end: bool = True) -> tuple[str, bool]:
        """The text that is final, and whether a stop string ended it; nothing may be pushed after that.

        `may_end` False: one that is complete with these characters is text like any other.
        """
        assert self.found is None, f"text {text!r} was pushed after the stop string {self.found!r}"
        if not self._stops:
            return text, False
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._advance(char, may_end)
            if self.found is not None:
                self._held = ""
                return seen[: end if self._is_kept else end - len(self.found)], True
        final = len(seen) - max(self._matched, default=0)
        self._held = seen[final:]
        return seen[:final], False

    @property
    def held(self) -> str:
        """The end of the text that may yet become a stop string."""
        return self._held

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str, may_end: bool) -> None:
        """One step of Knuth, Morris and Pratt's automaton for every stop string."""
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            n = self._matched[i]
            while n and stop[n] != char:
                n = borders[n]
            self._matched[i] = n = n + (stop[n] == char)
            if n == len(stop) and not may_end:
                self._matched[i] = borders[n]
            elif n == len(stop) > len(self.found or ""):
                self.found = stop


def _borders(stop: str) -> list[int]:
    """For each prefix length of `stop`, the longest shorter prefix that the prefix also ends with."""
    borders = [0, 0]
    for char in stop[1:]:
        n = borders[-1]
        while n and stop[n] != char:
            n = borders[n]
        borders.append(n + (stop[n] == char))
    return borders
