"""Progress on stderr: a bar on a terminal, else a line now and then."""

import time
from typing import Self

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from ..printable import printable
from ..progress import Measured, Stages
from .screen import Screen
from .words import spell_time

PLAIN_EVERY_S = 15.0
"""Seconds between lines of progress where stderr is no terminal."""
ROOMY = 80
"""Columns of a terminal from which on a bar has its usual length."""
ESTIMATED_S = 10.0
"""Seconds for which an estimate from before is better than what is measured."""

err = Screen(stderr=True)


def say(text: str) -> None:
    """Print what is being done, in one line."""
    err.print(Text.assemble(("·", "dim"), " ", printable(text)), soft_wrap=True)


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere.

    It pulses until it is known how far the work is: while a model loads, say.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        one_line = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=one_line),
            BarColumn(bar_width=10 if err.width >= ROOMY else 4),
            _Share(table_column=one_line),
            _Note(),  # the one that gives way
            _Left(table_column=one_line),
            console=err,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task(label, total=None, note="", left=None)
        self._expected: tuple[float, float] | None = None
        """Seconds that the work was expected to take, and when it was told"""
        self._said_at = 0.0
        self._said = (-1, -1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.disable:  # rich 13 prints a blank line for one that is disabled
            return
        if self._progress.tasks[-1].total is None:  # nothing that is worth leaving on the screen
            self._progress.remove_task(self._task)
        self._progress.stop()

    def begin(self, label: str) -> None:
        """Begin another part of the work, of which it is not known how far it is."""
        self._progress.remove_task(self._task)
        self._label, self._expected, self._said_at = label, None, time.monotonic()
        self._task = self._progress.add_task(label, total=None, note="", left=None)

    def expect(self, seconds: float) -> None:
        """Take an estimate of the time left, until what is measured is better."""
        self._expected = (seconds, time.monotonic())

    def update(self, done: int, total: int, note: str, left_s: float | None = None) -> None:
        """Show how far it is; when all is done it pulses again until the next part, or the end.

        Args:
            done: of the total.
            total: of the whole work, or of this part of it.
            note: in words.
            left_s: time left in seconds; None leaves the estimate to the bar.
        """
        now = time.monotonic()
        if self._expected is not None and (gone := now - self._expected[1]) < ESTIMATED_S:
            left_s = self._expected[0] - gone
        left = None if left_s is None else (left_s, now)
        self._progress.update(self._task, completed=done, total=total, note=note, left=left)
        ends = done == total and self._said != (done, total)
        if not err.is_terminal and (now - self._said_at > PLAIN_EVERY_S or ends):
            self._said_at, self._said = now, (done, total)
            words = "" if left_s is None or ends else f"  {spell_time(left_s)} left"
            say(f"{self._label} {done:,} of {total:,}  {note}{words}")
        if done >= total:
            self.begin(self._label)


class _Share(ProgressColumn):
    """Share that is done, where that is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>3.0f} %")


class _Note(ProgressColumn):
    """Note in words, cut where there is no room for it."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """Time left, where that is known; the time that it takes so far, where it is not."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        if task.total is None:
            return Text("" if task.elapsed is None else spell_time(task.elapsed))
        seconds = task.time_remaining if left is None else left[0] - (time.monotonic() - left[1])
        return Text("" if seconds is None else f"{spell_time(max(seconds, 1))} left")


class MeasureBar(Bar):
    """Shows how far an evaluation or an analysis is, by its parts."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._command = label
        self._stages: tuple[str, ...] = ()
        self._what = ""

    def __call__(self, event: "str | Measured | Stages") -> None:
        """Show an event."""
        match event:
            case Stages():
                self._stages = event.names
            case str() if self._place(event) is None:
                say(event)
            case str():
                self._enter(event)
            case Measured():
                self._enter(event.what)
                note, left = "", None
                if event.tokens_per_second is not None:
                    note = f"{event.tokens_per_second:,.0f} tokens/s"
                    left = (event.total - event.done) / max(event.tokens_per_second, 1e-9)
                self.update(event.done, event.total, note, left)

    def _place(self, words: str) -> int | None:
        """Return the number of a part of the work, from 1; None of what is none."""
        found = (i for i, name in enumerate(self._stages, 1) if words.startswith(name))
        return next(found, None)

    def _enter(self, words: str) -> None:
        """Show a part of the work, if it begins."""
        if words == self._what:
            return
        self._what = words
        place = self._place(words)
        count = "" if place is None else f" {place}/{len(self._stages)}"
        self.begin(f"{self._command}{count} {words}")
        if not err.is_terminal:
            say(f"{self._command}{count} {words}")
