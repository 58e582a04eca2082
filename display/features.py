"""Progress and results of analyses, explanations and pages."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..store.care.info import format_bytes
from .bars import Bar, say
from .words import fact_table, spell_time

if TYPE_CHECKING:
    from ..analyze.explain.explain import HeadDone, Quote
    from ..progress import Measured


class AnalyzeDisplay(Bar):
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


class ExplainDisplay(Bar):
    """Shows how far the heads are explained."""

    def __init__(self) -> None:
        super().__init__("explain")

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
                self.update(event.n_done, event.n_heads, escape(note[:60]))


class PageDisplay(Bar):
    """Shows how far a page is written."""

    def __call__(self, done: int, total: int) -> None:
        """Show the number of heads written."""
        self.update(done, total, "heads")


def view_table(result: dict[str, Any]) -> Table:
    """Return where a page is and how large."""
    rows = {
        "page": result["file"],
        "heads": f"{result['n_heads']:,}",
        "size": f"{format_bytes(result['n_bytes'])} in {result['n_files']:,} files",
    }
    if result["url"]:
        rows["at"] = f"{result['url']}  (Ctrl-C ends it)"
    if result["opened"] is False:
        rows["browser"] = "none found here; open the page by hand"
    return fact_table("a page of heads", rows)


MAINLY = 0.5
"""The score from which on a head is mainly of a type."""


def analyze_table(result: dict[str, Any]) -> Table:
    """Show how many heads are of each type."""
    n_fired = result["n_ov_heads"] - result["types"].get("silent", 0)
    rows = {
        "heads": f"{result['n_ov_heads']:,}, of which {n_fired:,} fired on {result['n_tokens']:,} "
        "tokens",
        **{name.replace("_", " "): f"{count:,}" for name, count in result["types"].items()},
        "time": spell_time(result["seconds"]),
        "analysis": result["analysis"],
    }
    if not result["with_model"]:
        rows["not done"] = "effects on logits, probes: give --model"
    return fact_table(f"heads of layer {result['layer']} of {result['run']}", rows)


def find_table(result: dict[str, Any]) -> Table:
    """Show heads of a type, each with what it is seen to do."""
    kind = result["type"].replace("_", "-")
    table = Table(title=f"{kind} heads", title_justify="left", box=SIMPLE_HEAD)
    for name in ("layer", "head", "score", "on text", "fires"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where it fires <> and what it reads []", overflow="fold")
    for head in result["heads"]:
        fires = "" if head["frequency"] is None else f"{head['frequency']:.3%}"
        table.add_row(
            str(head["layer"]),
            str(head["head"]),
            f"{head['score']:.2f}",
            "-" if head["score_on_text"] is None else f"{head['score_on_text']:.2f}",
            fires,
            escape("\n".join(head["evidence"] or ["a head of the language model itself"])),
        )
    table.caption = _score_in_words(kind, result["heads"])
    table.caption_justify = "left"
    return table


def _score_in_words(kind: str, heads: list[dict[str, Any]]) -> str:
    """Say what the scores of `find` are, and where the best of them is no such head."""
    if kind == "successor":
        told = "score: share of the ordinal words it reads whose next one it makes likeliest"
        return f"{told}; often of a single word, so look at the examples"
    spelled = {"probe": "random tokens that are repeated", "text": "text"}
    on = " or ".join(spelled[each] for each in sorted({head["measured_on"] for head in heads}))
    told = f"score: share of its reading that is of the type, on {on}"
    best = max(head["score"] for head in heads)
    few = f"; the best is {best:.2f}, so none is mainly {kind}"
    return told + (few if best < MAINLY else "")


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
    table = Table(title="explained", title_justify="left", box=SIMPLE_HEAD)
    for name in ("head", "score", "contexts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("explanation", overflow="fold")
    for row in result["first"]:
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        table.add_row(str(row["head"]), score, str(row["n_scored"] or "-"), escape(row["text"]))
    for row in result["failed"]:
        table.add_row(str(row["head"]), "-", "-", f"[red]failed: {escape(row['error'])}[/]")
    mean = "-" if result["mean_score"] is None else f"{result['mean_score']:.2f}"
    heads = f"{result['n_explained']:,} of {result['n_heads']:,} explained"
    sums = {
        "heads": f"{heads}, {result['n_failed']:,} failed",
        "mean score": f"{mean} of {result['n_scored']:,}; 0.5 is a guess, 1 is perfect",
        "requests": f"{result['requests']:,}, {result['tokens_in']:,} tokens sent and "
        f"{result['tokens_out']:,} received{_cost(result)}",
        "file": result["file"],
    }
    return Group(table, fact_table("in all", sums))
