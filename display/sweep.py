"""Progress of many runs at once, a bar over all and a live table; results of a sweep.

Where stderr is no terminal, a line every now and then, and one for every run that ends.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..store.care.info import format_bytes
from ..train.recipe import by_place
from .bars import PLAIN_EVERY_S, err, say
from .words import list_table, number, numbers, short, spell_time, words

if TYPE_CHECKING:
    from ..train.report.events import Ended, RunEvent, TrainEvent

WAITING, STARTING, RUNNING, FINISHED = "waiting", "starting", "running", "finished"
FAILED, BEFORE = "failed", "finished before"
STYLES = {
    WAITING: "dim",
    STARTING: "cyan",
    RUNNING: "cyan",
    FINISHED: "green",
    FAILED: "red",
    BEFORE: "dim green",
}
GOING = (WAITING, STARTING, RUNNING)
FIRST = (FAILED, RUNNING, STARTING, FINISHED, WAITING, BEFORE)
"""Whose rows are shown where there is no room for all."""
REFRESH_PER_S = 2
NUMBERS_WIDTH = 32
"""Width of the three columns of numbers, and of the space around all five."""


@dataclass(slots=True)
class _Run:
    state: str = WAITING
    tokens: int = 0
    train_tokens: int = 0
    first_tokens: int | None = None
    """Tokens of the first step that this call reported"""
    fvu: float | None = None
    dead: float | None = None
    loss: float | None = None
    data_wait: float = 0.0
    error: str = ""


class SweepDisplay:
    """Shows the events of a group of runs."""

    def __init__(
        self, runs: Sequence[str], *, label: str = "sweep", comparable: bool = True
    ) -> None:
        """Take what all runs are.

        Args:
            runs: their names, in the order in which they are shown.
            label: name of the command.
            comparable: whether all read and write the same sites, so that one is the best.
        """
        self._runs = {name: _Run() for name in runs}
        self._label = label
        self._comparable = comparable
        self._first_at: float | None = None
        """When the first steps were reported"""
        self._said_at = time.monotonic()
        self._live = Live(
            console=err,
            get_renderable=self._render,
            refresh_per_second=REFRESH_PER_S,
            auto_refresh=err.is_terminal,
        )

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._live.stop()  # draws it once more, and leaves it there
        else:
            say(self.summary())

    def __call__(self, event: "str | RunEvent") -> None:
        """Show an event of a run, or a line about all of them."""
        if isinstance(event, str):
            say(event)
            return
        run = self._runs.setdefault(event.run, _Run())
        self._take(event.run, run, event.event)
        now = time.monotonic()
        if not err.is_terminal and now - self._said_at > PLAIN_EVERY_S:
            self._said_at = now
            say(self.summary())

    def _take(self, name: str, run: _Run, event: "TrainEvent") -> None:
        from ..train.report.events import Ended, EvalReport, StepReport

        match event:
            case str():
                run.state = STARTING if run.state == WAITING else run.state
                say(f"{name}: {event}")
            case StepReport():
                run.state = RUNNING
                self._first_at = self._first_at or time.monotonic()
                run.first_tokens = event.tokens if run.first_tokens is None else run.first_tokens
                run.tokens, run.train_tokens = event.tokens, event.train_tokens
                run.loss, run.dead = event.loss, event.dead_fraction
                run.data_wait = event.data_wait_fraction
            case EvalReport():
                run.state = RUNNING
                run.fvu = event.held_out.fvu
            case Ended():
                _end(run, event)
                if not err.is_terminal:
                    say(f"{name}: {run.state}" + _outcome(run))

    def summary(self) -> str:
        """Return in a line where all runs stand."""
        counts = Counter(run.state for run in self._runs.values())
        states = ", ".join(f"{counts[state]} {state}" for state in STYLES if counts[state])
        parts = [f"{self._label} {self._share():.0%}: {states}"]
        if rate := self._rate():
            parts.append(f"{rate:,.0f} tok/s")
        if wait := max((r.data_wait for r in self._runs.values() if r.state == RUNNING), default=0):
            parts.append(f"data wait {wait:.0%}")
        fvus = [(r.fvu, name) for name, r in self._runs.items() if r.fvu is not None]
        measured = [each for each in fvus if not math.isnan(each[0])]
        if measured and self._comparable:
            fvu, name = min(measured)
            parts.append(f"best FVU {fvu:.4f} ({name})")
        left, _total = self._tokens()
        if rate and left:
            parts.append(f"{spell_time(left / rate)} left")
        return "  ".join(parts)

    def _tokens(self) -> tuple[int, int]:
        """Return the tokens left to train on and those of all runs.

        A run of which nothing is known yet takes as many as the longest; one that ended has none
        left.
        """
        runs = self._runs.values()
        usual = max((run.train_tokens for run in runs), default=0)
        going = [run for run in runs if run.state in GOING]
        left = sum((run.train_tokens or usual) - run.tokens for run in going)
        return left, sum(run.train_tokens or usual for run in runs)

    def _share(self) -> float:
        """Return the share of all work that is done."""
        left, total = self._tokens()
        if not total:
            return float(all(r.state not in GOING for r in self._runs.values()))
        return 1 - left / total

    def _rate(self) -> float:
        """Return the tokens of all runs per second since the first were told of."""
        if self._first_at is None:
            return 0.0
        first = [(r.first_tokens, r.tokens) for r in self._runs.values()]
        new = sum(now - before for before, now in first if before is not None)
        return new / max(time.monotonic() - self._first_at, 1e-9)

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1, completed=self._share(), width=20), escape(self.summary()))
        return Group(self.table(max(3, err.height - 8)), bar)

    def table(self, most_rows: int) -> Table:
        """Return the runs in a table of so many rows; the last says what is left out, if any."""
        table = Table(box=SIMPLE_HEAD)
        room = err.width - NUMBERS_WIDTH  # of names and states; numbers are always seen whole
        names, states = room - max(16, room // 2), max(16, room // 2)
        table.add_column("run", no_wrap=True, overflow="ellipsis", max_width=max(12, names))
        for name in ("FVU", "dead", "loss"):
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
        table.add_column("state", no_wrap=True, overflow="ellipsis", max_width=states)
        shown = self._shown(most_rows)
        for name, run in self._runs.items():
            if name in shown:
                state = f"[{STYLES[run.state]}]{escape(_state(run))}[/]"
                values = (short(run.fvu), short(run.dead, ".1%"), short(run.loss))
                table.add_row(escape(name), *values, state)
        counts = Counter(run.state for name, run in self._runs.items() if name not in shown)
        if counts:
            rest = ", ".join(f"{counts[state]} {state}" for state in STYLES if counts[state])
            table.add_row(f"[dim]and {counts.total()} more[/]", "", "", "", f"[dim]{rest}[/]")
        return table

    def _shown(self, most_rows: int) -> set[str]:
        """Return the names of the runs that there is room for, those first that need a look."""
        if len(self._runs) <= most_rows:
            return set(self._runs)
        ranked = sorted(self._runs, key=lambda name: FIRST.index(self._runs[name].state))
        return set(ranked[: most_rows - 1])


def _end(run: _Run, event: "Ended") -> None:
    if event.error is not None:
        run.state, run.error = FAILED, event.error
        return
    run.state = BEFORE if event.before else FINISHED
    if event.result is not None:
        run.fvu, run.dead = event.result.fvu, event.result.dead_fraction
        run.train_tokens = event.result.train_tokens
        run.tokens = run.train_tokens


def _state(run: _Run) -> str:
    if run.state == FAILED:
        return f"failed: {run.error}"
    if run.state == RUNNING and run.train_tokens:
        return f"running {run.tokens / run.train_tokens:.0%}"
    return run.state


def _outcome(run: _Run) -> str:
    if run.state == FAILED:
        return f": {run.error}"
    return "" if run.fvu is None else f", FVU {run.fvu:.4f}, dead {short(run.dead, '.1%')}"


def sweep_table(result: dict[str, Any]) -> Table:
    """Show the rows of a sweep: the settings that differ, then what came out.

    The best is in bold, of each place.
    """
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    settings = names[: names.index("fvu")] if "fvu" in names else names
    masked = any(row.get("fvu_all") not in (None, row.get("fvu")) for row in rows)
    shown = ("fvu", "fvu_all") if masked else ("fvu",)
    heads = ("FVU", "with masked")[: len(shown)]
    columns = numbers(*map(escape, settings), *heads, "L0", "dead", "tokens/s")
    table = list_table("swept", *columns, words("run"))
    best = best_rows(rows)
    for row in rows:
        values = [escape(_setting(row.get(name))) for name in settings]
        if row.get("error"):
            failed = f"[red]failed: {escape(row['error'])}[/]"
            table.add_row(*values, *("-" * (3 + len(shown))), failed)
            continue
        table.add_row(
            *values,
            *(number(row.get(name)) for name in shown),
            f"{row['l0']:.1f}",
            f"{row['dead_fraction']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            escape(row["run"]),
            style="bold" if row in best else None,
        )
    size = format_bytes(result["bytes_read"])
    table.caption = escape(f"sweep.csv and pareto.png in {result['out']}; {size} read")
    return table


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the row of the lowest FVU of each place, among those that have one."""
    places = by_place(row for row in rows if row.get("fvu") is not None)
    return [min(some, key=lambda row: float(row["fvu"])) for some in places]


def _setting(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
