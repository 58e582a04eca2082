"""Tables of changed heads."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from ..store.layers import spell_layers
from .words import fact_table, list_table, numbers, short, words


def ablate_tables(result: dict[str, Any]) -> RenderableType:
    """Return what `lorsa ablate` prints."""
    kept = {"keep": "stays", "drop": "is dropped: the Lorsa stands in for the layer"}
    rows = {
        "heads": f"{spell_layers(result['heads'])} {result['change']}",
        "Lorsa's error": f"{kept[result['error']]} (NMSE {result['prompt_nmse']:.3f} here)",
        "before": result["before"],
        "KL": f"{result['kl']:.4g} nats between the predictions before and after",
    }
    if result["silent"]:
        rows["silent"] = f"{spell_layers(result['silent'])} do not fire on this prompt"
    strongest = ", ".join(f"{head}: {act:.3g}" for head, act in result["strongest"].items())
    rows["strongest"] = f"{strongest or 'none'} (at the last token, of all heads)"
    title = f"layer {result['layer']} of {result['run']}, in {result['model']}"
    return Group(
        fact_table(title, rows),
        _prompt_table(result),
        _next_table("likeliest next tokens before", result["likeliest_before"]),
        _next_table("likeliest after", result["likeliest_after"]),
        _next_table("changed most", result["most_changed"]),
    )


def _prompt_table(result: dict[str, Any]) -> Table:
    position = Column("position", justify="right")
    figures = numbers("loss of the next", "change", "KL")
    table = list_table("the prompt", position, words("token"), words("heads that fire"), *figures)
    for token in result["tokens"]:
        acts = ", ".join(f"{head}: {act:.3g}" for head, act in token["acts"].items())
        before, after = token["loss_before"], token["loss_after"]
        change = "-" if before is None or math.isinf(before) else f"{after - before:+.4f}"
        cells = (_spelled(token), acts, short(before), change, f"{token['kl']:.4f}")
        table.add_row(str(token["position"]), *cells, style="bold" if acts else None)
    return table


def _next_table(title: str, tokens: list[dict[str, Any]]) -> Table:
    table = list_table(title, words("token"), *numbers("before", "after", "change"))
    for token in tokens:
        before, after = token["before"], token["after"]
        cells = (f"{before:.2%}", f"{after:.2%}", f"{after - before:+.2%}")
        table.add_row(_spelled(token), *cells)
    return table


def _spelled(token: dict[str, Any]) -> str:
    """Show a token with its spaces and line ends, or its id without a tokenizer."""
    return str(token["id"]) if token["text"] is None else escape(repr(token["text"]))
