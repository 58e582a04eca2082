"""Tables of changed features."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ..store.layers import spell_layers
from .words import (
    NOUNS,
    fact_table,
    list_table,
    model_name,
    numbers,
    place_of,
    short,
    things_of,
    words,
)

MOST_NAMED = 12
"""Features that are named before the others are counted."""
MOST_ACTS = 4
"""Features whose activations are shown at a token."""


def ablate_tables(result: dict[str, Any]) -> RenderableType:
    """Return what `lorsa ablate` prints."""
    noun, things = NOUNS[result["kind"]], things_of(result["kind"])
    kept = {"keep": "stays", "drop": f"is dropped: the {noun} stands in"}
    rows = {
        things: f"{_named(result['features'], things)} {result['change']}",
        f"{noun}'s error": f"{kept[result['error']]} (NMSE {result['prompt_nmse']:.3f} here)",
        "before": result["before"],
        "KL": f"{result['kl']:.4g} nats between the predictions before and after",
    }
    if silent := result["silent"]:
        rows["silent"] = (
            f"{_named(silent, things)} {'does' if len(silent) == 1 else 'do'} not fire here"
        )
    strongest = ", ".join(f"{head}: {act:.3g}" for head, act in result["strongest"].items())
    rows["strongest"] = f"{strongest or 'none'} (at the last token, of all {things})"
    title = f"{place_of(result)} of {result['run']}, in {model_name(result['model'])}"
    return Group(fact_table(title, rows), _prompt_table(result, things), _next_table(result))


def _named(ids: list[int], things: str) -> str:
    """Spell features; of many, how many there are and the first."""
    if len(ids) <= MOST_NAMED:
        return spell_layers(ids)
    return f"{len(ids):,} {things} ({spell_layers(ids[:MOST_NAMED])}, ...)"


def _prompt_table(result: dict[str, Any], things: str) -> Table:
    figures = numbers("loss of the next", "change", "KL")
    texts = words("token"), words(f"{things} that fire")
    table = list_table("the prompt", *numbers("position"), *texts, *figures)
    for token in result["tokens"]:
        acts = _strongest(token["acts"])
        before, after = token["loss_before"], token["loss_after"]
        change = "-" if before is None or math.isinf(before) else f"{after - before:+.4f}"
        cells = (_spelled(token), acts, short(before), change, f"{token['kl']:.4f}")
        table.add_row(str(token["position"]), *cells, style="bold" if acts else None)
    return table


def _strongest(acts: dict[int, float]) -> str:
    """Spell the features with the largest activations, and how many there are besides."""
    ranked = sorted(acts.items(), key=lambda item: -abs(item[1]))
    shown = [f"{head}: {act:.3g}" for head, act in ranked[:MOST_ACTS]]
    rest = [f"{len(ranked) - MOST_ACTS} more"] if len(ranked) > MOST_ACTS else []
    return ", ".join(shown + rest)


def _next_table(result: dict[str, Any]) -> Table:
    """Show the next tokens that change most, with the likeliest before and after."""
    likeliest = [*result["likeliest_before"][:1], *result["likeliest_after"][:1]]
    tokens = {token["id"]: token for token in [*result["most_changed"], *likeliest]}
    table = list_table("the next token", words("token"), *numbers("before", "after", "change"))
    for token in sorted(tokens.values(), key=lambda t: -abs(t["after"] - t["before"])):
        before, after = token["before"], token["after"]
        cells = (f"{before:.2%}", f"{after:.2%}", f"{after - before:+.2%}")
        table.add_row(_spelled(token), *cells)
    return table


def _spelled(token: dict[str, Any]) -> str:
    """Show a token with its spaces and line ends, or its id without a tokenizer."""
    return str(token["id"]) if token["text"] is None else escape(repr(token["text"]))
