"""Tables of a trace."""

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ..store.layers import spell_layers
from .words import fact_table, list_table, model_name, numbers, short, spell_time, words

MODULES = {"attn": "attention", "mlp": "MLP"}
KEPT_AS = {"attn": "paths go through it, its pattern as it is", "mlp": "an error node a token"}
"""What becomes of a module without a dictionary."""
LEAST_SHARE = 0.01
"""Share of a pattern from which on a token is named as a competitor."""
MOST_TARGETS = 4
"""Targets that are named before the others are counted."""


def trace_tables(result: dict[str, Any]) -> RenderableType:
    """Return what `lorsa trace` prints."""
    nodes, rows = result["nodes"], result["rows"]
    facts = {
        "explains": _targets(result["targets"]),
        "prompt": f"{result['n_tokens']:,} tokens",
        **_not_replaced(result),
        **_scores(result["scores"]),
        **_errors(result["errors"]),
        "sums": f"edges add up to what features read, to {rows['worst']:.1g} of it",
        "nodes": (
            f"{nodes['kept']:,} of {nodes['all']:,} written, {rows['kept']:,} of "
            f"{rows['edges']:,} edges"
        ),
        "time": spell_time(result["seconds"]),
    }
    title = f"{result['trace']}, in {model_name(result['model'])}"
    tables = [fact_table(title, facts), _strongest(result["strongest"])]
    return Group(*tables, *([_heads(result["heads"])] if result["heads"] else []))


def _targets(targets: list[dict[str, Any]]) -> str:
    ranked = sorted(targets, key=lambda target: -float(target["weight"]))
    named = ", ".join(map(_target, ranked[:MOST_TARGETS]))
    rest = len(ranked) - MOST_TARGETS
    return named + (f", {rest} more" if rest > 0 else "")


def _target(target: dict[str, Any]) -> str:
    if target["token"] is None:
        return f"the activation {target['value']:.3g} of a feature"
    less = "" if target["less"] is None else f" less {_spelled(target['less'])}"
    likely = "" if less else f" ({target['probability']:.1%})"
    return f"{_spelled(target)}{less}{likely}"


def _spelled(token: dict[str, Any]) -> str:
    return str(token["token"]) if token["text"] is None else repr(token["text"])


def _not_replaced(result: dict[str, Any]) -> dict[str, str]:
    """Return a row for attention and for MLPs of which some have no dictionary."""
    return {
        f"{MODULES[what]} without": f"layers {spell_layers(layers)}: {KEPT_AS[what]}"
        for what, layers in result["not_replaced"].items()
        if layers
    }


def _scores(scores: dict[str, Any]) -> dict[str, str]:
    """Return the scores in plain words: of the whole graph, and of what is written."""
    whole, pruned = scores["whole"], scores["pruned"]
    return {
        "replacement": (
            f"{short(whole['replacement'], '.2f')} of the influence of tokens and errors is the "
            f"tokens'; {short(pruned['replacement'], '.2f')} in what is written"
        ),
        "completeness": (
            f"{short(whole['completeness'], '.2f')} of what features and logits read is no error; "
            f"{short(pruned['completeness'], '.2f')} in what is written"
        ),
        "not shown": (
            f"{whole['not_shown']:.1%} of the influence ends in edges that are not kept; "
            f"{pruned['not_shown']:.1%} in what is written"
        ),
    }


def _errors(errors: list[dict[str, Any]]) -> dict[str, str]:
    """Return a row for the largest errors."""
    named = ", ".join(
        f"{_node(node)} at token {node['position']} ({node['influence']:.1%})" for node in errors
    )
    return {"largest errors": named} if named else {}


def _heads(heads: list[dict[str, Any]]) -> Table:
    """Show which keys QK heads chose, and by how much over the others."""
    columns = numbers("influence", "layer", "QK head", "token", "looks at", "share", "score")
    table = list_table("why they look there", *columns, words("instead of"))
    for head in heads:
        others = [
            f"{each['key']} ({each['share']:.0%})"
            for each in head["competitors"]
            if each["share"] >= LEAST_SHARE
        ]
        table.add_row(
            f"{head['influence']:.2%}",
            *(str(head[name]) for name in ("layer", "head", "query", "key")),
            f"{head['share']:.0%}",
            f"{head['centred']:+.2f}",
            ", ".join(others),
        )
    table.caption = "score: that of the key less the mean of all; its pairs are in pairs.parquet"
    return table


def _strongest(nodes: list[dict[str, Any]]) -> Table:
    columns = (*numbers("influence", "layer"), words("node"), *numbers("position"), words("token"))
    table = list_table("the strongest nodes, errors aside", *columns)
    for node in nodes:
        token, position = node["token"], node["position"]
        table.add_row(
            f"{node['influence']:.2%}",
            short(node["layer"], "d"),
            escape(_node(node)),
            "all" if position is None else str(position),
            "" if token is None else escape(repr(token)),
        )
    table.caption = "influence: share of the weight of what is explained that paths through it have"
    return table


def _node(node: dict[str, Any]) -> str:
    """Return a node in words."""
    kind, run = node["kind"], node["run"]
    if kind == "feature":
        return f"{node['unit']} {node['feature']} of {run}, activation {node['value']:.3g}"
    if kind in ("error", "bias"):
        return f"{kind} of {run or MODULES[node['module']] + ' ' + str(node['layer'])}"
    return "embedding" if kind == "embed" else "logit"
