"""What people see: progress on stderr, results on stdout."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .harvest import Plan, SelfCheck
from .harvest import Progress as HarvestProgress
from .store import spell_layers
from .train import Look, StepReport

PLAIN_EVERY_S = 15.0
"""Seconds between lines of progress where stderr is no terminal."""

err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Tell what is being done."""
    err.print(f"[dim]·[/] {text}", markup=True, soft_wrap=True)


class _Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: Any = None
        self._said_at = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, note: str) -> None:
        """Show how far it is."""
        if self._task is None:
            self._task = self._progress.add_task(self._label, total=total, note="")
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if not err.is_terminal and (now - self._said_at > PLAIN_EVERY_S or done == total):
            self._said_at = now
            say(f"{self._label} {done:,} of {total:,}  {note}")


class HarvestDisplay(_Bar):
    """Shows the events of a harvest."""

    def __init__(self) -> None:
        super().__init__("harvest")

    def __call__(self, event: str | Plan | SelfCheck | HarvestProgress) -> None:
        """Show an event."""
        match event:
            case str():
                say(event)
            case Plan():
                self._plan(event)
            case SelfCheck():
                worst = max(event.errors.values())
                say(f"self-check: y recomputed from x within {worst:.1e} (limit {event.limit:.0e})")
            case HarvestProgress():
                self.update(
                    event.tokens, event.n_tokens, f"{event.tokens_per_second:,.0f} tokens/s"
                )

    def _plan(self, plan: Plan) -> None:
        names = list(plan.layers.values())
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        table = Table.grid(padding=(0, 2))
        rows = {
            "model": plan.model,
            "layers": f"{spell_layers(list(plan.layers))} ({shown})",
            "tokens": f"{plan.n_tokens:,} in sequences of {plan.n_ctx:,}",
            "per token": f"{plan.bytes_per_token:,} bytes",
            "store": f"{_size(plan.total_bytes)} of {_size(plan.free_bytes)} free",
        }
        if plan.first_tokens:
            rows["begins"] = repr(plan.first_tokens)
        for name, value in rows.items():
            table.add_row(f"  {name}", value)
        err.print(table, markup=False)


class TrainDisplay(_Bar):
    """Shows the events of a training run."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer}")
        self._fvu = "-"

    def __call__(self, event: str | StepReport | Look) -> None:
        """Show an event."""
        match event:
            case str():
                say(event)
            case Look():
                self._fvu = f"{event.held_out.fvu:.3f}"
            case StepReport():
                note = (
                    f"{event.tokens_per_second:,.0f} tokens/s  loss {event.loss:.4f}  "
                    f"FVU {self._fvu}  dead {event.dead_fraction:.1%}  "
                    f"data wait {event.data_wait_fraction:.1%}"
                )
                self.update(event.tokens, event.train_tokens, note)


def show(result: dict[str, Any], title: str) -> None:
    """Print a result as a table on stdout."""
    out = Console(highlight=False)
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in _flat(result):
        table.add_row(name, _text(name, value))
    out.print(table, markup=False)


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested results as rows."""
    rows: list[tuple[str, Any]] = []
    for name, value in data.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                rows += _flat(item, f"{prefix}{name}[{i}].")
        else:
            rows.append((prefix + name, value))
    return rows


def _text(name: str, value: Any) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return _size(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"
