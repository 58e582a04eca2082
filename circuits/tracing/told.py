"""What is told of a trace on a screen or as JSON: its scores and its strongest nodes."""

from pathlib import Path
from typing import Any

import numpy as np

from ...store.parquet import numbers
from .files import Trace

N_STRONGEST = 12
"""Nodes that are named."""


def told(root: Path, trace: Trace) -> dict[str, Any]:
    """Return the facts of a trace with its strongest nodes, as JSON-able data.

    Args:
        root: folder of the trace.
        trace: as `trace` returns it, or read back.
    """
    facts = trace.facts
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
        "strongest": _strongest(trace),
        "seconds": facts["seconds"],
    }


def _strongest(trace: Trace) -> list[dict[str, Any]]:
    """Return the nodes with most influence, targets aside, the strongest first."""
    runs, tokens = trace.facts["runs"], trace.facts["tokens"]
    order = np.argsort(-numbers(trace.nodes["influence"]), kind="stable")
    found = []
    for row in trace.nodes.take(order[: N_STRONGEST + len(trace.facts["targets"])]).to_pylist():
        if row["weight"] > 0 or row["influence"] == 0:
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
    return found[:N_STRONGEST]


def _unit(kind: str) -> str:
    return "head" if kind == "lorsa" else "feature"
