"""Results of a search for heads of a type."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from .words import fact_table, list_table, numbers, short, words

SCORED = {
    "both": "the share of its reading that is of the type, in text or on random tokens that are "
    "repeated, whichever is smaller, by a lower bound",
    "text": "the share of its reading that is of the type, by a lower bound, in text alone",
    "words": "the share of the ordinal words it reads whose next one it makes likeliest, by a "
    "lower bound",
}
"""Scores in words, by what they are measured on."""


def find_table(result: dict[str, Any]) -> Table:
    """Show heads of a type, each with what it is seen to do; a line where there is none."""
    kind = result["type"].replace("_", "-")
    title, least = f"{kind} heads", result["least"]
    if not result["heads"]:
        best = f"the best has a score of {result['best']:.2f}, and it takes {least:g}"
        rows = {"none here": f"{best} (--least 0 shows the best)"}
        return fact_table(title, rows | {"score": SCORED[result["measured_on"]]})
    columns = numbers("layer", "head", "score", "in text", "on probes", "fires")
    table = list_table(title, *columns, words("where it fires <> and what it reads []"))
    for head in result["heads"]:
        fires = "" if head["frequency"] is None else f"{head['frequency']:.3%}"
        table.add_row(
            str(head["layer"]),
            str(head["head"]),
            f"{head['score']:.2f}",
            short(head["score_on_text"], ".2f"),
            short(head["score_on_probes"], ".2f"),
            fires,
            escape("\n".join(head["evidence"] or ["a head of the language model itself"])),
        )
    table.caption = f"score: {SCORED[result['measured_on']]}"
    return table
