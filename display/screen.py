"""The terminal: whatever is shown on it is text, also where others wrote it."""

import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ..printable import printable


class Screen(Console):
    """A console that obeys no text: control characters are spelled out, :codes: stay as they are.

    Markup within text of others is for who prints it to escape.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make text of a string, spelled before its width is taken."""
        return super().render_str(printable(text, lines=True), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything; what rich itself tells the terminal goes through."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text, lines=True), style)

    def _innermost(self) -> IO[str]:
        """Return the stream itself: a bar puts a second guard around the one of `printable`."""
        stream = self._file or (sys.stderr if self.stderr else sys.stdout)
        while (inner := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = inner
        return stream

    def _set_file(self, stream: IO[str]) -> None:
        self._file = stream

    file = property(_innermost, _set_file)
