"""What is told of a trace on a screen or as JSON: its scores and its strongest nodes."""

from pathlib import Path
from typing import Any

import numpy as np

from ...store.parquet import numbers
from .files import Trace

N_STRONGEST = 12
"""Nodes that are named, errors aside."""
N_ERRORS = 4
"""Errors that are."""


def told(root: Path, trace: Trace) -> dict[str, Any]:
    """Return the facts of a trace with its strongest nodes, as JSON-able data.

    Args:
        root: folder of the trace.
        trace: as `trace` returns it, or read back.
    """
    facts = trace.facts
    ranked = _ranked(trace)
    errors = [node for node in ranked if node["kind"] == "error"]
    strongest = [node for node in ranked if node["kind"] != "error"]
    replaced, n_layers = facts["replaced"], facts["model"]["n_layers"]
    return {
        "trace": str(root),
        "model": facts["model"]["id"],
        "prompt": facts["prompt"],
        "n_tokens": len(facts["tokens"]),
        "runs": [run["run"] for run in facts["runs"]],
        "not_replaced": {
            what: sorted(set(range(n_layers)) - set(replaced[what])) for what in replaced
        },
        "targets": facts["targets"],
        "scores": facts["scores"],
        "nodes": facts["nodes"],
        "rows": facts["rows"],
        "strongest": strongest[:N_STRONGEST],
        "errors": errors[:N_ERRORS],
        "heads": facts["heads"],
        "seconds": facts["seconds"],
    }


def _ranked(trace: Trace) -> list[dict[str, Any]]:
    """Return the nodes of the graph by influence, targets aside."""
    runs, tokens = trace.facts["runs"], trace.facts["tokens"]
    order = np.argsort(-numbers(trace.nodes["influence"]), kind="stable")
    found = []
    for row in trace.nodes.take(order).to_pylist():
        if row["weight"] > 0 or row["influence"] == 0 or not row["in_graph"]:
            continue
        position, run = row["position"], row["run"]
        found.append(
            {name: row[name] for name in ("node", "kind", "layer", "position", "feature")}
            | {
                "module": None if row["layer"] is None else ("mlp", "attn")[row["depth"] % 2],
                "run": None if run is None else runs[run]["name"],
                "unit": None if run is None else _unit(runs[run]["kind"]),
                "token": None if position is None else tokens[position]["text"],
                "value": row["value"],
                "influence": row["influence"],
            }
        )
    return found


def _unit(kind: str) -> str:
    return "head" if kind == "lorsa" else "feature"
