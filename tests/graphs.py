"""Graphs and traces by hand, without a language model."""

from typing import Any

import pyarrow as pa
import torch
from lorsa.circuits.tracing.edges import Rows
from lorsa.circuits.tracing.files import Trace
from lorsa.circuits.tracing.influence import influence_of, prune
from lorsa.circuits.tracing.nodes import BIAS, EMBED, ERROR, FEATURE, LOGIT, Nodes
from lorsa.circuits.tracing.tables import PAIRS, edges_table, nodes_table

TEXTS = ("The", " cat", "<b>")
TOKENS = (5, 7, 9)
"""Prompt of three tokens, the last of which is markup in any page."""
RUNS = {
    "crm": ("lorsa", "transcoder"),
    "plt": ("transcoder", "transcoder"),
}


def graph(kinds: tuple[str, ...] = RUNS["crm"]) -> Nodes:
    """Return the nodes of a model of two layers, with one dictionary in each.

    Run 1 is of the MLP of layer 1; run 0 is of the attention of layer 0, or else of its MLP.
    """
    at, run = (1, -1) if kinds[0] == "lorsa" else (2, 0)
    rows = [  # kind, depth, position, run, feature, value
        (EMBED, 0, 0, -1, 5, 1.0),
        (EMBED, 0, 1, -1, 7, 1.0),
        (EMBED, 0, 2, -1, 9, 1.0),
        (BIAS, at, -1, 0, -1, 1.0),
        (FEATURE, at, 1, 0, 301, 2.5),
        (ERROR, at, 1, 0, -1, 1.0),
        (ERROR, 2, 2, run, -1, 1.0),
        (FEATURE, 4, 2, 1, 17, -0.75),
        (ERROR, 4, 2, 1, -1, 1.0),
        (LOGIT, 5, 2, -1, 3, 4.0),
        (LOGIT, 5, 2, -1, 8, 1.0),
    ]
    kinds = (torch.int8, torch.int16, torch.int32, torch.int16, torch.int64, torch.float32)
    columns = zip(*rows, strict=True)
    return Nodes(*(torch.tensor(c, dtype=k) for c, k in zip(columns, kinds, strict=True)))


def facts(kinds: tuple[str, ...] = RUNS["crm"]) -> dict[str, Any]:
    places = {"lorsa": ("layer-0", "0.attn_out"), "transcoder": ("1.mlp", "1.mlp_out")}
    return {
        "name": "a-trace",
        "lorsa": "1.0",
        "created_ms": 1_700_000_000_000,
        "model": {"id": "some/model", "revision": None, "n_layers": 2},
        "prompt": "The cat<b>",
        "tokens": [{"token": i, "text": t} for i, t in zip(TOKENS, TEXTS, strict=True)],
        "runs": [
            {"run": f"runs/{i}-{kind}", "name": f"{i}-{kind}", "kind": kind,
             "place": places[kind][0], "n_features": 400,
             "n_qk_heads": 50 if kind == "lorsa" else None, "writes": [places[kind][1]]}
            for i, kind in enumerate(kinds)
        ],
        "targets": [
            {"node": 9, "token": 3, "text": ' "x"', "less": None, "probability": 0.75,
             "value": 4.0, "weight": 0.75},
            {"node": 10, "token": 8, "text": None, "less": {"token": 2, "text": "y"},
             "probability": 0.25, "value": 1.0, "weight": 0.25},
        ],
        "settings": {"max_logits": 10, "logit_prob": 0.95, "keep": 64, "node_threshold": 0.8,
                     "edge_threshold": 0.98},
        "scores": {"whole": {"replacement": 0.5, "completeness": None}, "pruned": {}},
    }  # fmt: skip


def pair_rows() -> pa.Table:
    """Return pairs of the Lorsa's QK head at token 1: it has feature 301 of 400, 8 a QK head."""
    rows = [
        ("pair", 1, 0, 1.5),
        ("pair", 1, 6, -0.25),
        ("pair", None, 0, 0.5),
        ("query", 1, None, 1.25),
        ("key", None, 6, -0.25),
        ("key", None, 0, 2.0),
    ]
    same = {"layer": 0, "head": 301 // 8, "query": 1, "key": 0}
    names = ("kind", "query_node", "key_node", "value")
    return pa.Table.from_pylist([same | dict(zip(names, row, strict=True)) for row in rows], PAIRS)


def trace(kinds: tuple[str, ...] = RUNS["crm"], pairs: pa.Table | None = None) -> Trace:
    """Return a trace, with pairs or without."""
    nodes = graph(kinds)
    weights = torch.zeros(len(nodes), dtype=torch.float64)
    weights[9:] = torch.tensor([0.75, 0.25])
    rows = rows_of(
        {
            4: {0: 1.0, 2: -0.5},
            7: {4: 2.0, 3: 0.25, 5: 0.5, 6: -1.0},
            9: {7: -3.0, 8: 0.125, 1: 1.0},
            10: {7: 1.5, 4: 0.5},
        },
        {9: (0.25, -0.5)},
    )
    pruned = prune(nodes, rows, weights, node_threshold=1.0, edge_threshold=1.0)
    table = nodes_table(nodes, pruned, weights, influence_of(nodes, rows, weights), 2)
    return Trace(facts=facts(kinds), nodes=table, edges=edges_table(pruned), pairs=pairs)


def nodes_of(kind: list[int], depth: list[int]) -> Nodes:
    n = len(kind)
    return Nodes(
        kind=torch.tensor(kind, dtype=torch.int8),
        depth=torch.tensor(depth, dtype=torch.int16),
        position=torch.zeros(n, dtype=torch.int32),
        run=torch.zeros(n, dtype=torch.int16),
        feature=torch.arange(n),
        value=torch.ones(n),
    )


def rows_of(edges: dict[int, dict[int, float]], rest: dict[int, tuple[float, float]]) -> Rows:
    """Return rows by target and source; the rest of a target is positive and negative."""
    targets = sorted(edges)
    sources = [s for t in targets for s in edges[t]]
    counts = torch.tensor([0] + [len(edges[t]) for t in targets])
    rests = torch.tensor([rest.get(t, (0.0, 0.0)) for t in targets]).view(-1, 2)
    weight = torch.tensor([w for t in targets for w in edges[t].values()])
    return Rows(
        target=torch.tensor(targets, dtype=torch.int32),
        start=counts.cumsum(0),
        source=torch.tensor(sources, dtype=torch.int32),
        weight=weight,
        rest_positive=rests[:, 0],
        rest_negative=rests[:, 1],
        constant=torch.zeros(len(targets)),
        total=torch.zeros(len(targets)),
    )
