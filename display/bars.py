"""Progress on stderr: a bar on a terminal, else a line now and then."""

import time
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..printable import printable
from .screen import Screen
from .words import spell_time

if TYPE_CHECKING:
    from ..progress import Measured

PLAIN_EVERY_S = 15.0
"""Seconds between lines of progress where stderr is no terminal."""

err = Screen(stderr=True)


def say(text: str) -> None:
    """Print what is being done, in one line."""
    err.print(Text.assemble(("·", "dim"), " ", printable(text)), soft_wrap=True)


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: Any = None
        self._said_at = 0.0
        self._said = (-1, -1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.disable:  # rich 13 prints a blank line for one that is disabled
            self._progress.stop()

    def update(self, done: int, total: int, note: str, left_s: float | None = None) -> None:
        """Show how far it is; on a terminal the bar knows the time left by itself."""
        if self._task is None:
            self._task = self._progress.add_task(self._label, total=total, note="")
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        ends = done == total and self._said != (done, total)
        if not err.is_terminal and (now - self._said_at > PLAIN_EVERY_S or ends):
            self._said_at, self._said = now, (done, total)
            left = "" if left_s is None else f"  {spell_time(left_s)} left"
            say(f"{self._label} {done:,} of {total:,}  {note}{left}")


class MeasureBar(Bar):
    """Shows how far an evaluation or an analysis is."""

    def __call__(self, event: "str | Measured") -> None:
        """Show an event."""
        if isinstance(event, str):
            say(event)
            return
        note, left = event.what, None
        if event.tokens_per_second is not None:
            note += f"  {event.tokens_per_second:,.0f} tokens/s"
            left = (event.total - event.done) / max(event.tokens_per_second, 1e-9)
        self.update(event.done, event.total, note, left)
