"""Influence of nodes on what a trace explains, its scores, and what of it is kept.

    A[t, s]      = |w(t, s)| / sum of |contributions to t|, those that are not kept included
    B            = A + A^2 + ... = (I - A)^-1 - I              strength of all paths from s to t
    influence(s) = sum over t of weight(t) B[t, s]

The weights of all targets add up to 1; logits have their probabilities. Nodes of one depth do not
feed each other, so one sweep from the logits down gives all of it: what has come to a node when
its depth is reached is final. No power of A is taken, and nothing is larger than nodes and edges.

Every path ends in an embedding, a bias or an error. An error is also whatever is not shown: the
rest of a row, a feature without a row, and what is pruned.

    replacement  = token influence / (token influence + error influence)
    completeness = sum over t of influence(t) (1 - error share of t's inputs) / sum of influence(t)

Completeness is over the nodes whose inputs are explained, logits included. Two choices are ours,
since their graphs have no biases: a bias node counts in the sum of a row and is neither token nor
error; the constant of a row, which no node makes, counts nowhere.

Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models"
(graph pruning, graph completeness and replacement scores); nodes that are not explored count as
error there too.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .edges import Rows
from .nodes import BIAS, EMBED, ERROR, FEATURE, LOGIT, Nodes

EDGES_AT_ONCE = 1 << 22
"""Edges that temporary tensors are made of, unless a single row has more."""
DROPPED_BITS = 15
"""Lowest bits of a float32 that a histogram does not tell apart."""


class Scores(NamedTuple):
    """Scores of a trace, and where its influence ends: four shares, which add up to 1."""

    replacement: float
    """Token influence over that of tokens and errors; NaN where there is neither"""
    completeness: float
    """Share of the inputs of explained nodes that is no error, weighted by their influence"""
    token: float
    """Influence of embeddings"""
    bias: float
    """Influence of biases"""
    error: float
    """Influence of error nodes"""
    not_shown: float
    """Influence that ends in rests of rows, in nodes without the row they have, and in what is
    pruned"""


class Pruned(NamedTuple):
    """What is kept of a graph."""

    nodes: Tensor
    """Whether a node is kept, bool, [n]"""
    rows: Rows
    """Rows of the nodes that are kept; what is cut of a row is in its rest"""


class Sweep:
    """Influence on its way down: targets of one depth after another, the highest first."""

    def __init__(self, nodes: Nodes, weights: Tensor) -> None:
        """Begin with the weights of the targets, [n]; they are divided by their sum."""
        self.nodes = nodes
        self.weights = weights.double() / weights.double().sum()
        self.flow = self.weights.clone()
        """Weight and influence of every node that all targets above have been taken of, [n]"""

    def take(self, rows: Rows) -> None:
        """Pass on the influence of some targets to their sources.

        Args:
            rows: in the order of their targets, all below those that were taken before.

        Raises:
            ValueError: a source is no lower than its target.
        """
        for part in _parts(self.nodes, rows):
            self.flow.index_add_(0, part.source, part.share * self.flow[part.target][part.row])

    @property
    def influence(self) -> Tensor:
        """Influence of every node, float64, [n]."""
        return self.flow - self.weights


def influence_of(nodes: Nodes, rows: Rows, weights: Tensor) -> Tensor:
    """Return the influence of every node, float64, [n].

    Args:
        nodes: of the graph, n of them.
        rows: in the order of their targets.
        weights: of the targets, [n]; 0 of other nodes.
    """
    sweep = Sweep(nodes, weights)
    sweep.take(rows)
    return sweep.influence


def cumulative(influence: Tensor) -> Tensor:
    """Return for each node the share of all influence that it and stronger nodes have, [n]."""
    strongest, order = influence.sort(descending=True, stable=True)
    shares = strongest.cumsum(0) / strongest.sum()
    return torch.empty_like(shares).scatter_(0, order, shares)


def scores(nodes: Nodes, rows: Rows, weights: Tensor) -> Scores:
    """Return the scores of a graph; see `influence_of`."""
    sweep = Sweep(nodes, weights)
    sweep.take(rows)
    unexplored = (nodes.kind == FEATURE) | (nodes.kind == LOGIT)
    unexplored[rows.target.long()] = False
    is_error = (nodes.kind == ERROR) | unexplored
    lost = explained = total = 0.0
    for part in _parts(nodes, rows):
        flow = sweep.flow[part.target]
        errors = part.rest.index_add(0, part.row, part.share * is_error[part.source])
        lost += float(flow @ part.rest)
        explained += float(flow @ (1 - errors))
        total += float(flow.sum())
    influence = sweep.influence
    token, bias, error = (float(influence[nodes.kind == k].sum()) for k in (EMBED, BIAS, ERROR))
    not_shown = lost + float(sweep.flow[unexplored].sum())
    wrong = error + not_shown
    return Scores(
        replacement=token / (token + wrong) if token + wrong > 0 else torch.nan,
        completeness=explained / total if total > 0 else torch.nan,
        token=token,
        bias=bias,
        error=error,
        not_shown=not_shown,
    )


def prune(
    nodes: Nodes, rows: Rows, weights: Tensor, *, node_threshold: float, edge_threshold: float
) -> Pruned:
    """Keep the fewest nodes, then edges, that have a share of all influence.

    Errors and other nodes have thresholds of their own: where few layers have dictionaries, the
    strongest nodes are errors, and their graph would have none of the features. Embeddings and
    targets stay. Then nodes that nothing is left of to lead to them, or on from them, are dropped
    until none is.

    Args:
        nodes, rows, weights: see `influence_of`.
        node_threshold: share of the influence of all errors, and of all others, that those kept
            have together.
        edge_threshold: share of the influence of edges between them that those kept have together;
            that of an edge is its target's influence times its share of the row.
    """
    influence = influence_of(nodes, rows, weights)
    roots = _is_root(nodes, rows)
    stays = kept = (nodes.kind == EMBED) | (weights > 0)
    for some in (nodes.kind == ERROR, nodes.kind != ERROR):
        kept = kept | fewest(influence.where(some, 0.0), node_threshold)
    rows = _between(nodes, rows, kept)
    sweep = Sweep(nodes, weights)
    sweep.take(rows)

    def strength(part: _Part) -> Tensor:
        return part.share * sweep.flow[part.target][part.row]

    bound = _least_of(lambda: map(strength, _parts(nodes, rows)), edge_threshold)
    rows = _cut(nodes, rows, kept, lambda part: strength(part) >= bound)
    while True:
        linked = stays | (kept & _is_source(nodes, rows))
        linked &= stays | roots | (nodes.kind != FEATURE) | _is_reached(nodes, rows)
        if torch.equal(linked, kept):
            return Pruned(kept, rows)
        kept = linked
        rows = _between(nodes, rows, kept)


def _is_root(nodes: Nodes, rows: Rows) -> Tensor:
    """Return which have a row of a constant alone, as features of an SAE of `mlp_out`, [n]."""
    empty = (rows.start.diff() == 0) & (rows.rest_positive == 0) & (rows.rest_negative == 0)
    return torch.isin(torch.arange(len(nodes)), rows.target[empty].long())


def fewest(values: Tensor, share: float) -> Tensor:
    """Return which are the fewest values that have a share of their sum, bool, [n].

    Args:
        values: 0 or more, [n].
        share: of the sum, above 0 and at most 1, which all above 0 have.
    """
    return values.double() >= _least_of(lambda: [values], share)


class _Part(NamedTuple):
    """Some rows of one depth, and their edges."""

    rows: slice
    edges: slice
    target: Tensor
    """Nodes, int64, [rows]"""
    row: Tensor
    """Row of each edge, counted within the part, int64, [edges]"""
    source: Tensor
    """Nodes, int64, [edges]"""
    weight: Tensor
    """Contributions, float64, [edges]"""
    share: Tensor
    """Share of each edge in the absolute sum of its row, float64, [edges]"""
    rest: Tensor
    """Share of what is not kept, float64, [rows]; 1 of a row that nothing contributes to"""


def _parts(nodes: Nodes, rows: Rows) -> Iterator[_Part]:
    """Yield all rows in parts, the highest depth first.

    Raises:
        ValueError: the targets are not in order, or a source is no lower than its target.
    """
    depth = nodes.depth[rows.target.long()]
    if bool((rows.target.diff() <= 0).any()):
        raise ValueError("the rows are not in the order of their targets")
    ends = [0, *depth.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()]
    for lo, hi in reversed(list(pairwise(ends))):
        first_of_depth = int(torch.searchsorted(nodes.depth, depth[lo]))
        for part in _of_one_depth(rows, lo, hi):
            if len(part.source) and int(part.source.max()) >= first_of_depth:
                raise ValueError("a source is no lower than its target")
            yield part


def _of_one_depth(rows: Rows, lo: int, hi: int) -> Iterator[_Part]:
    while lo < hi:
        most = rows.start[lo] + EDGES_AT_ONCE
        fits = int(torch.searchsorted(rows.start, most, right=True)) - 1
        stop = max(lo + 1, min(hi, fits))
        yield _part(rows, slice(lo, stop))
        lo = stop


def _part(rows: Rows, some: slice) -> _Part:
    edges = slice(int(rows.start[some.start]), int(rows.start[some.stop]))
    n_edges = rows.start[some.start : some.stop + 1].diff()
    row = torch.arange(len(n_edges)).repeat_interleave(n_edges)
    weight = rows.weight[edges].double()
    rest = rows.rest_positive[some].double() + rows.rest_negative[some].double().abs()
    norm = rest.index_add(0, row, weight.abs())
    return _Part(
        rows=some,
        edges=edges,
        target=rows.target[some].long(),
        row=row,
        source=rows.source[edges].long(),
        weight=weight,
        share=weight.abs() / norm.clamp(min=torch.finfo(norm.dtype).tiny)[row],
        rest=torch.where(norm > 0, rest / norm, 1.0),
    )


def _between(nodes: Nodes, rows: Rows, kept: Tensor) -> Rows:
    """Return rows and edges of nodes that are kept, bool, [n]."""
    return _cut(nodes, rows, kept, lambda part: kept[part.source])


def _cut(nodes: Nodes, rows: Rows, kept: Tensor, keep: Callable[[_Part], Tensor]) -> Rows:
    """Return the rows of nodes that are kept, with the edges that are; the others are rest.

    Args:
        nodes, rows: graph.
        kept: whether a node is kept, bool, [n].
        keep: whether each edge of a part is kept, bool, [edges].
    """
    stays = torch.zeros(len(rows.source), dtype=torch.bool)
    positive, negative = rows.rest_positive.clone(), rows.rest_negative.clone()
    n_edges = rows.start.diff()
    for part in _parts(nodes, rows):
        stays[part.edges] = wanted = keep(part) & kept[part.target][part.row]
        gone = part.weight.masked_fill(wanted, 0.0)
        size = len(part.target)
        sums = torch.zeros(2, size, dtype=torch.float64)
        sums[0].index_add_(0, part.row, gone.clamp(min=0))
        sums[1].index_add_(0, part.row, gone.clamp(max=0))
        positive[part.rows] += sums[0].to(positive.dtype)
        negative[part.rows] += sums[1].to(negative.dtype)
        n_edges[part.rows] = torch.zeros(size).long().index_add_(0, part.row, wanted.long())
    there = kept[rows.target.long()]
    return Rows(
        target=rows.target[there],
        start=torch.cat([torch.zeros(1, dtype=torch.int64), n_edges[there].cumsum(0)]),
        source=rows.source[stays],
        weight=rows.weight[stays],
        rest_positive=positive[there],
        rest_negative=negative[there],
        constant=rows.constant[there],
        total=rows.total[there],
    )


def _is_source(nodes: Nodes, rows: Rows) -> Tensor:
    found = torch.zeros(len(nodes.kind), dtype=torch.bool)
    found[rows.source.long()] = True
    return found


def _is_reached(nodes: Nodes, rows: Rows) -> Tensor:
    """Return whether nodes have an input, bool, [n]."""
    found = torch.zeros(len(nodes.kind), dtype=torch.bool)
    found[rows.target[rows.start.diff() > 0].long()] = True
    return found


def _least_of(values: Callable[[], Iterable[Tensor]], share: float) -> float:
    """Return the largest bound with which the values from it on have a share of their sum.

    A histogram finds the bin in which the bound lies, and only that bin is sorted.

    Args:
        values: called twice for all values in parts, each [any], 0 or more.
        share: of the sum, above 0 and at most 1, which all above 0 have.

    Returns:
        A number above 0; infinity where all are 0.
    """
    n_bins = 1 << (31 - DROPPED_BITS)
    sums = torch.zeros(n_bins, dtype=torch.float64)
    for part in values():
        sums += torch.bincount(_bins(part), weights=part.double(), minlength=n_bins)
    if not (total := float(sums.sum())) > 0:
        return torch.inf
    if share >= 1:
        return torch.finfo(torch.float64).tiny
    wanted = share * total
    from_top = sums.flip(0).cumsum(0).flip(0)  # [bins], sum of a bin and all above
    in_bin = max(int((from_top >= wanted).sum()) - 1, int(sums.nonzero()[0]))
    some = torch.cat([part[_bins(part) == in_bin].double() for part in values()])
    some = some[some > 0].sort(descending=True).values
    reached = float(from_top[in_bin] - sums[in_bin]) + some.cumsum(0)
    return float(some[min(int((reached < wanted).sum()), len(some) - 1)])


def _bins(values: Tensor) -> Tensor:
    """Return the bin of each value: the first bits of its float32, which are in its order."""
    return values.float().view(torch.int32) >> DROPPED_BITS
