"""Text of others made fit for a terminal: what would act on it is spelled out.

Names, messages and passages come from files that strangers wrote. A terminal obeys control
characters within them: they move the cursor, erase lines, change the title, or turn the direction
of what follows.
"""

import re
import sys
import unicodedata
from typing import Any, TextIO

JOINERS = "\u200c\u200d"
"""Characters without a width that Persian, Indic scripts and emoji are written with."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text fit to print: line ends as ↵, other unseen characters as <1B> or <202E>.

    Args:
        text: of any origin; lone surrogates stand for bytes of names that are not UTF-8.
        lines: whether it is of several lines, whose ends stay.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    return "".join(c if lines and c == "\n" else _spelled(c) for c in text)


def _spelled(char: str) -> str:
    if char == "\n":
        return "↵"
    if char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs":
        return char
    return f"<{ord(char):02X}>"


class PrintableStream:
    """A stream on which all that libraries print is fit for a terminal, without their colours.

    rich writes past it, with colours of its own; see `display.screen`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text, its line ends kept."""
        plain = _COLOUR.sub("", text).expandtabs()
        self.rich_proxied_file.write(printable(plain, lines=True))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def guard_streams() -> None:
    """Let nothing of others act on the terminal by stderr, and no encoding be an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = PrintableStream(sys.stderr)
