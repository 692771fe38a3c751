"""Who wrote what, on a terminal."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from nudging.api.outputs import Segment

GUIDE_STYLE = "bold cyan"
# A model may write anything: nothing of it is to command the terminal.
CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


class Terminal(Console):
    """A console whose reader may go away as that of any other output."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


class Ink:
    """Makes segments, as they come, into printable text in which the guide's words stand out.

    They are bold and coloured; where the console has no styles (a pipe, a file) they stand in [brackets].
    """

    def __init__(self, console: Console) -> None:
        self._has_styles = console.color_system is not None
        self._in_brackets = False
        self._has_begun = False

    def write(self, segments: Iterable[Segment]) -> Text:
        """The segments' text, ready to print; blanks before the first word are left out."""
        text = Text()
        for segment in segments:
            words = segment.text.translate(CONTROLS)
            words = words if self._has_begun else words.lstrip()
            if not words:
                continue
            self._has_begun = True
            is_base = segment.author == "base"
            if self._has_styles:
                text.append(words, style=None if is_base else GUIDE_STYLE)
            elif is_base:
                text.append(self._close() + words)
            else:
                text.append(self._open(words))
        return text

    def end(self) -> Text:
        """What still has to follow the last segment."""
        return Text(self._close())

    def legend(self) -> Text:
        """How the guide's words look."""
        return (
            Text("the guide's words look like ")
            .append(self.write([Segment("guide", "this", ())]))
            .append(self.end())
        )

    def _open(self, words: str) -> str:
        if self._in_brackets:
            return words
        self._in_brackets = True
        bare = words.lstrip()
        return words[: len(words) - len(bare)] + "[" + bare

    def _close(self) -> str:
        closing = "]" if self._in_brackets else ""
        self._in_brackets = False
        return closing


def show(console: Console, text: Text, end: str = "") -> None:
    """Print just this text: nothing is highlighted, wrapped by words or cropped."""
    console.print(text, end=end, soft_wrap=True, highlight=False)
