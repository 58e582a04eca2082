"""Results of a search for heads of a type."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from .words import list_table, numbers, short, words

MAINLY = 0.5
"""The score from which on a head is mainly of a type."""


def find_table(result: dict[str, Any]) -> Table:
    """Show heads of a type, each with what it is seen to do."""
    kind = result["type"].replace("_", "-")
    columns = numbers("layer", "head", "score", "on text", "fires")
    evidence = words("where it fires <> and what it reads []")
    table = list_table(f"{kind} heads", *columns, evidence)
    for head in result["heads"]:
        fires = "" if head["frequency"] is None else f"{head['frequency']:.3%}"
        table.add_row(
            str(head["layer"]),
            str(head["head"]),
            f"{head['score']:.2f}",
            short(head["score_on_text"], ".2f"),
            fires,
            escape("\n".join(head["evidence"] or ["a head of the language model itself"])),
        )
    table.caption = _score_in_words(kind, result["heads"])
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
