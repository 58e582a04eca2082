"""Tables of a trace: the nodes and edges that are kept, numbered anew."""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...store.parquet import numbers
from .influence import Pruned, cumulative
from .nodes import EVERYWHERE, KINDS, NOBODY, Nodes, logit_depth

_WORDS = pa.dictionary(pa.int8(), pa.string())
NODES = pa.schema(
    [
        ("node", pa.int32()),  # row number
        ("in_graph", pa.bool_()),  # or only named by pairs.parquet
        ("kind", _WORDS),  # embed, feature, error, bias or logit
        ("depth", pa.int16()),  # 0 embeddings, 1 + 2 l attention of layer l, 2 + 2 l its MLP
        ("layer", pa.int16()),  # null of embeddings and logits
        ("position", pa.int32()),  # token of the prompt; null of a bias, which acts at all
        ("run", pa.int16()),  # of the runs in trace.json; null of what no dictionary writes
        ("feature", pa.int64()),  # or the token of embeddings and logits; null of errors and biases
        ("value", pa.float32()),  # activation; a logit less the mean logit
        ("weight", pa.float64()),  # of a target: its share of what is explained; 0 of others
        ("influence", pa.float64()),  # on all targets, through all paths; of the whole graph
        ("cumulative", pa.float64()),  # influence that it and stronger nodes have, as a share
        ("total", pa.float32()),  # pre-activation that its edges add up to; null without edges
        ("constant", pa.float32()),  # of that, what no node makes
        ("rest_positive", pa.float32()),  # and what edges that are not here make
        ("rest_negative", pa.float32()),
    ]
)
PAIRS = pa.schema(
    [
        ("layer", pa.int16()),
        ("head", pa.int32()),  # QK head of the Lorsa that stands there
        ("query", pa.int32()),  # token that looks
        ("key", pa.int32()),  # token that it looks at
        ("kind", _WORDS),  # pair, or query or key: all pairs of one node on that side
        ("query_node", pa.int32()),  # null of what no node makes, and where all are meant
        ("key_node", pa.int32()),
        ("value", pa.float32()),  # what it adds to the score of the key less the mean of all
    ]
)
EDGES = pa.schema([("target", pa.int32()), ("source", pa.int32()), ("weight", pa.float32())])
KNOWN = ("node", "in_graph", "kind", "depth", "value", "weight", "influence", "cumulative")
"""Columns of nodes that are never null."""


def nodes_table(
    nodes: Nodes,
    pruned: Pruned,
    weights: Tensor,
    influence: Tensor,
    n_layers: int,
    shown: Tensor | None = None,
) -> pa.Table:
    """Return the nodes that are kept or shown besides, in the schema NODES.

    Args:
        nodes: of the whole graph, n of them.
        pruned: what is kept of it.
        weights: of the targets, which add up to 1, [n].
        influence: of every node, in the whole graph, [n].
        n_layers: of the language model.
        shown: nodes of the table, bool, [n]; None takes those that are kept.
    """
    kept, rows = pruned.nodes if shown is None else shown, pruned.rows
    some = nodes.of(kept)
    depth = some.depth.long()
    in_layer = (depth > 0) & (depth < logit_depth(n_layers))
    columns = {
        "node": pa.array(np.arange(len(some))),
        "in_graph": pa.array(pruned.nodes[kept].numpy()),
        "kind": pa.array([KINDS[kind] for kind in some.kind.tolist()]).dictionary_encode(),
        "depth": pa.array(some.depth.numpy()),
        "layer": _nullable((depth - 1) // 2, in_layer),
        "position": _nullable(some.position, some.position != EVERYWHERE),
        "run": _nullable(some.run, some.run != NOBODY),
        "feature": _nullable(some.feature, some.feature != NOBODY),
        "value": pa.array(some.value.numpy()),
        "weight": pa.array(weights[kept].double().numpy()),
        "influence": pa.array(influence[kept].numpy()),
        "cumulative": pa.array(cumulative(influence)[kept].numpy()),
    }
    for name in ("total", "constant", "rest_positive", "rest_negative"):
        values = torch.zeros(len(nodes)).index_copy(0, rows.target.long(), getattr(rows, name))
        has_row = torch.zeros(len(nodes)).bool().index_fill(0, rows.target.long(), True)
        columns[name] = _nullable(values[kept], has_row[kept])
    return pa.table([columns[name] for name in NODES.names], NODES.names).cast(NODES)


def edges_table(pruned: Pruned, shown: Tensor | None = None) -> pa.Table:
    """Return the edges that are kept, in the schema EDGES; see `nodes_table`."""
    number = numbered(pruned.nodes if shown is None else shown)
    rows = pruned.rows
    target = number[rows.target.long()].repeat_interleave(rows.start.diff())
    columns = [target.numpy(), number[rows.source.long()].numpy(), rows.weight.numpy()]
    return pa.table([pa.array(each) for each in columns], EDGES.names).cast(EDGES)


def numbered(shown: Tensor) -> Tensor:
    """Return the row of each node in the table of those shown, int64, [n]; of others any."""
    return shown.cumsum(0) - 1


def _nullable(values: Tensor, known: Tensor) -> pa.Array:
    return pa.array(values.numpy(), mask=~known.numpy())


def require_sound(nodes: pa.Table, edges: pa.Table) -> None:
    """Raise ValueError unless nodes are numbered and edges lead up from one to another."""
    for column in KNOWN:
        if nodes[column].null_count:
            raise ValueError(f"{column} is null in {nodes[column].null_count:,} nodes")
    n = nodes.num_rows
    if not np.array_equal(numbers(nodes["node"]), np.arange(n)):
        raise ValueError("its nodes are not numbered")
    source, target = (numbers(edges[name]) for name in ("source", "target"))
    for ends in (source, target):
        if len(ends) and not (np.isfinite(ends).all() and ends.min() >= 0 and ends.max() < n):
            raise ValueError("an edge is of no node")
    depth = numbers(nodes["depth"])
    if (depth[source.astype(int)] >= depth[target.astype(int)]).any():
        raise ValueError("an edge leads down")


def require_pairs(pairs: pa.Table, n: int) -> None:
    """Raise ValueError unless pairs are of n nodes."""
    for name in ("query_node", "key_node"):
        ends = numbers(pairs[name])
        ends = ends[np.isfinite(ends)]
        if len(ends) and not (ends.min() >= 0 and ends.max() < n):
            raise ValueError("a pair is of no node")
