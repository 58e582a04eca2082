"""Progress and results of explanations."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from .bars import Bar, say
from .words import fact_table, list_table, numbers, short, words

if TYPE_CHECKING:
    from ..analyze.explain.explain import HeadDone, Quote


class ExplainDisplay(Bar):
    """Shows how far the heads are explained."""

    def __call__(self, event: "str | Quote | HeadDone") -> None:
        """Show an event."""
        from ..analyze.explain.explain import HeadDone, Quote

        match event:
            case str():
                say(event)
            case Quote():
                say(", ".join(estimate_rows(asdict(event)).values()))
            case HeadDone():
                note = f"head {event.head}: {event.words}"
                self.update(event.n_done, event.n_heads, note)


def estimate_rows(result: dict[str, Any]) -> dict[str, str]:
    """Return in words what explaining heads takes."""
    key = "no key" if result["key"] is None else f"key from {result['key']}"
    before = f", {result['n_before']:,} of them before" if result["n_before"] else ""
    return {
        "heads": f"{result['n_heads']:,} heads{before}",
        "requests": f"{result['requests']:,} requests, with passages of the analysed text",
        "to": f"{result['model']} at {result['endpoint']}, {key}",
        "tokens": f"about {result['tokens_in']:,} tokens sent and {result['tokens_out']:,} received"
        + _cost(result),
    }


def _cost(result: dict[str, Any]) -> str:
    return "" if (cost := result["cost_usd"]) is None else f", {cost:,.4f} USD"


def explain_table(result: dict[str, Any]) -> Table | Group:
    """Show what was said of the first heads and what it took, or what it would take."""
    if not result["sent"]:
        rows = estimate_rows(result)
        return fact_table(
            "explanations would take", rows | {"sent": "nothing; the same command with --yes sends"}
        )
    columns = numbers("head", "score", "contexts")
    table = list_table("explained", *columns, words("explanation"))
    for row in result["first"]:
        scores = (short(row["score"], ".2f"), str(row["n_scored"] or "-"))
        table.add_row(str(row["head"]), *scores, escape(row["text"]))
    for row in result["failed"]:
        table.add_row(str(row["head"]), "-", "-", f"[red]failed: {escape(row['error'])}[/]")
    mean = short(result["mean_score"], ".2f")
    heads = f"{result['n_explained']:,} of {result['n_heads']:,} explained"
    sums = {
        "heads": f"{heads}, {result['n_failed']:,} failed",
        "mean score": f"{mean} of {result['n_scored']:,}; 0.5 is a guess, 1 is perfect",
        "requests": f"{result['requests']:,}, {result['tokens_in']:,} tokens sent and "
        f"{result['tokens_out']:,} received{_cost(result)}",
        "file": result["file"],
    }
    return Group(table, fact_table("in all", sums))
