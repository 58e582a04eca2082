"""Trace of a prompt: from a language model and its dictionaries to a folder with the graph.

The graph is explored from the targets down. What has come to the nodes of one depth is final when
it is their turn (`influence.Sweep`), so the rows of a depth are made once, of the fewest nodes that
have nearly all of the influence on it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from ...errors import AnalyzeError
from ...version import __version__
from .aims import Aims, find_aims
from .config import TraceConfig
from .edges import Rows, edges
from .files import Trace, read_trace, write_trace
from .frozen import Frozen
from .heads import Choice, choices, head_facts, named, pairs_table
from .influence import Pruned, Sweep, fewest, prune, scores
from .nodes import FEATURE, LOGIT, Nodes
from .opened import Opened, open_request
from .sources import find_nodes
from .tables import edges_table, nodes_table, numbered

EDGE_BYTES = 16
"""Bytes of an edge: node and weight, once as they are made and once put together."""
WORST_SUM = 1e-4
"""Deviation of rows; more is a model that is not understood."""
Report = Callable[[str], None]


class Traced(NamedTuple):
    """A trace, and where it lies."""

    root: Path
    """Folder of the trace"""
    trace: Trace


class Explored(NamedTuple):
    """The edges of a prompt's graph that were made."""

    rows: Rows
    """Rows of the nodes that were explored, in their order"""
    influence: Tensor
    """Influence of every node, float64, [n]"""
    n_reached: int
    """Features and logits that have any influence"""


def trace(config: TraceConfig, *, report: Report = lambda text: None) -> Traced:
    """Trace a prompt and write the trace.

    Where the same was asked before, the trace that it left is read and nothing is computed.

    Args:
        config: the request.
        report: called with lines of text.

    Raises:
        CheckpointError: a run holds no dictionary.
        AnalyzeError: the runs do not fit together or the model; the prompt or target does not fit
            the model; the graph needs more memory than there is; edges do not add up; or the name
            is taken by another trace.
        AttachError: the model has no such layer or site, or another width.
        LanguageModelError: the language model, or a tokenizer that is needed, cannot be loaded.
    """
    began = time.monotonic()
    request = open_request(config, report)
    if request.is_made:
        kept = read_trace(request.root)
        report(f"traced before, and kept in {request.root}")
        return Traced(request.root, kept)
    frozen = request.freeze(report)
    aims = find_aims(request, frozen)
    frozen = frozen.aimed(*aims.goals)
    nodes = find_nodes(frozen)
    require_memory(nodes, config.keep)
    report(f"{len(nodes):,} nodes on {len(frozen.tokens):,} tokens")
    weights = aims.weights(nodes)
    found = explore(frozen, nodes, weights, keep=config.keep, share=config.explore)
    worst = require_sums(found.rows)
    report(f"{len(found.rows.target):,} rows add up, to {worst:.1g}")
    pruned = prune(
        nodes,
        found.rows,
        weights,
        node_threshold=config.node_threshold,
        edge_threshold=config.edge_threshold,
    )
    chosen = choices(frozen, nodes, pruned.nodes, found.influence, config.qk)
    made = _made(request, aims, _Graph(nodes, weights, found, pruned, chosen))
    made.facts["rows"]["worst"] = worst
    made.facts["seconds"] = time.monotonic() - began
    write_trace(request.root, made)
    return Traced(request.root, made)


def explore(frozen: Frozen, nodes: Nodes, weights: Tensor, *, keep: int, share: float) -> Explored:
    """Make the rows of targets, and of the nodes below them that have influence.

    Args:
        frozen: the run.
        nodes: all of its nodes, n of them.
        weights: of the targets, [n].
        keep: edges that are kept of a row.
        share: of the influence on each depth; the fewest nodes that have it are explored.
    """
    sweep, found, n_reached = Sweep(nodes, weights), [], 0
    can_be = (nodes.kind == FEATURE) | (nodes.kind == LOGIT)
    for depth in reversed(nodes.depth.unique().tolist()):
        at = (can_be & (nodes.depth == depth)).nonzero()[:, 0]
        flow = sweep.flow[at]
        n_reached += int((flow > 0).sum())
        at = at[fewest(flow, share) | (weights[at] > 0)]
        if len(at):
            is_target = bool((weights[at] > 0).any())  # few, and every path ends in them
            found.append(edges(frozen, nodes, at, keep=None if is_target else keep))
            sweep.take(found[-1])
    return Explored(joined(found[::-1]), sweep.influence, n_reached)


def require_sums(rows: Rows) -> float:
    """Return by how much a row misses its total at most, as `Rows.deviation` has it.

    Raises:
        AnalyzeError: it is more than WORST_SUM.
    """
    if (worst := rows.deviation) > WORST_SUM:
        raise AnalyzeError(
            f"edges miss the pre-activation of their target by {worst:.1e} of what they add up, so "
            "this model is not understood well enough to be traced; nothing is written"
        )
    return worst


def require_memory(nodes: Nodes, keep: int) -> None:
    """Raise AnalyzeError if edges may take more memory than there is."""
    n = int((nodes.kind == FEATURE).sum())
    needed, free = n * min(keep, len(nodes)) * EDGE_BYTES, psutil.virtual_memory().available
    if needed > free:
        fits = free // (EDGE_BYTES * n)
        raise AnalyzeError(
            f"{n:,} features with {keep:,} edges each take up to {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; give {f'--keep {fits}' if fits else 'a shorter prompt'}"
        )


def joined(parts: list[Rows]) -> Rows:
    """Return rows of several parts, in their order."""
    starts, n_edges = [torch.zeros(1, dtype=torch.int64)], 0
    for part in parts:
        starts.append(part.start[1:] + n_edges)
        n_edges += int(part.start[-1])
    names = [name for name in Rows._fields if name != "start"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Rows(start=torch.cat(starts), **joined)


class _Graph(NamedTuple):
    """All that is found of a prompt."""

    nodes: Nodes
    weights: Tensor
    found: Explored
    pruned: Pruned
    chosen: list[Choice]


def _made(request: Opened, aims: Aims, graph: _Graph) -> Trace:
    """Return the trace of a graph, with the facts of it."""
    nodes, weights, found, pruned, chosen = graph
    shown = pruned.nodes | named(chosen, len(nodes))
    n_layers = request.subject.n_layers
    facts = {
        **request.facts(),
        "lorsa": __version__,
        "created_ms": round(time.time() * 1000),
        "targets": aims.facts(nodes, numbered(shown)),
        "scores": {
            "whole": scores(nodes, found.rows, weights)._asdict(),
            "pruned": scores(nodes, pruned.rows, weights)._asdict(),
        },
        "nodes": {
            "all": len(nodes),
            "reached": found.n_reached,
            "explored": len(found.rows.target),
            "kept": int(pruned.nodes.sum()),
        },
        "rows": {"edges": len(found.rows.source), "kept": len(pruned.rows.source)},
        "heads": head_facts(chosen),
    }
    return Trace(
        facts=facts,
        nodes=nodes_table(nodes, pruned, weights, found.influence, n_layers, shown),
        edges=edges_table(pruned, shown),
        pairs=pairs_table(chosen, numbered(shown)) if chosen else None,
    )
