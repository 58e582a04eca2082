"""Names in Markdown: text of others is shown as text, never as markup or a new line."""

import json
import re

PLAIN = re.compile(r"(?!.*www\.)[^\W_]([^\W_]|[ ./,+-])*", re.IGNORECASE)
"""Pattern of a text that no renderer takes for anything else."""


def one_line(text: str) -> str:
    """Return a text with spaces in place of line breaks, controls and all else that is unseen."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shown(text: str) -> str:
    """Return a text for a line or a cell: as it is where it is plain, in a code span where not."""
    line = one_line(text)
    return line if not line or PLAIN.fullmatch(line) else code(line)


def code(text: str) -> str:
    """Return a text as a code span, for a line or a cell; a backtick becomes an apostrophe."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def block(language: str, text: str) -> str:
    """Return a block of code, which no line of its text ends."""
    lines = [one_line(line) if not line.isprintable() else line for line in text.split("\n")]
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *lines, fence])


def python_text(text: str) -> str:
    """Return a text as a literal of Python, in double quotes where it can be read so."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)
