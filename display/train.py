"""Progress and results of training."""

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from .bars import Bar, say
from .words import NOUNS, list_table, number, numbers, spell_time, words

if TYPE_CHECKING:
    from ..train.report.events import EvalReport, TrainEvent


class TrainDisplay(Bar):
    """Shows the events of a training run."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._fvu = "-"

    def __call__(self, event: "TrainEvent") -> None:
        """Show an event."""
        from ..train.report.events import EvalReport, StepReport

        match event:
            case str():
                say(f"{self._label}: {event}")
            case EvalReport():
                self._fvu = f"{event.held_out.fvu:.3f}"
                say(f"{self._label}: {eval_line(event)}")
            case StepReport():
                note = (
                    f"{event.tokens_per_second:,.0f} tok/s  FVU {self._fvu}  "
                    f"dead {event.dead_fraction:.1%}  data wait {event.data_wait_fraction:.0%}"
                )
                left = (event.train_tokens - event.tokens) / max(event.tokens_per_second, 1e-9)
                self.update(event.tokens, event.train_tokens, note, left)


def eval_line(event: "EvalReport") -> str:
    """Return in words the quality that an eval measured."""
    found = event.held_out
    masked = ""
    if found.masked_fraction:
        masked = f" ({found.fvu_all:.4f} with the {found.masked_fraction:.1%} that do not count)"
    return (
        f"FVU {found.fvu:.4f}{masked} on {found.n_tokens:,} held-out tokens, after {event.tokens:,}"
    )


def train_table(result: dict[str, Any]) -> Table:
    """Return the runs that were trained."""
    runs = result["runs"]
    masked = any(run.get("masked_fraction") for run in runs)
    fvus = ("FVU", "with masked") if masked else ("FVU",)
    columns = numbers("layer", *fvus, "L0", "dead", "tokens", "tokens/s", "time")
    table = list_table("trained", *columns, words("kind"), words("run"))
    for run in runs:
        table.add_row(
            str(run["layer"]),
            *(number(run[name]) for name in ("fvu", "fvu_all")[: len(fvus)]),
            f"{run['l0']:.1f}",
            f"{run['dead_fraction']:.1%}",
            f"{run['train_tokens']:,}",
            f"{run['tokens_per_second']:,.0f}",
            spell_time(run["seconds"]),
            NOUNS[run["kind"]],
            escape(run["run"]),
        )
    for run in result["failed"]:
        table.add_row(
            str(run["layer"]),
            *("-" * (len(columns) - 1)),
            "",
            f"[red]failed: {escape(run['error'])}[/]",
        )
    windows = {f"{run['dead_window_tokens']:,}" for run in runs} or {"-"}
    table.caption = f"dead: did not fire on the last {' or '.join(sorted(windows))} tokens"
    if masked:
        table.caption += (
            "; FVU: on the tokens that count, and with those that the loss mask leaves out"
        )
    return table
