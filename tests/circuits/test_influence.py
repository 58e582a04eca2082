"""Influence, scores and pruning against their dense definitions."""

from typing import Any, NamedTuple

import pytest
import torch
from graphs import nodes_of, rows_of
from lorsa.circuits.tracing import influence as module
from lorsa.circuits.tracing.edges import Rows
from lorsa.circuits.tracing.influence import (
    Sweep,
    _least_of,
    cumulative,
    fewest,
    influence_of,
    prune,
    scores,
)
from lorsa.circuits.tracing.nodes import BIAS, EMBED, ERROR, FEATURE, LOGIT, Nodes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


class Graph(NamedTuple):
    nodes: Nodes
    rows: Rows
    weights: Tensor


def random_graph(seed: int, n_depths: int = 6, width: int = 7) -> Graph:
    """Return a DAG of all kinds of nodes, with features without a row and rows with rests."""
    random = torch.Generator().manual_seed(seed)
    kind, depth = [EMBED] * width, [0] * width
    for d in range(1, n_depths):
        kind += [FEATURE] * width + [ERROR] * 2 + [BIAS]
        depth += [d] * (width + 3)
    kind, depth = kind + [LOGIT] * 3, depth + [n_depths] * 3
    edges: dict[int, dict[int, float]] = {}
    rest = {}
    for t, (k, d) in enumerate(zip(kind, depth, strict=True)):
        draw = torch.rand(4, generator=random)
        if k not in (FEATURE, LOGIT) or (k == FEATURE and draw[0] < 0.15):
            continue
        lower = [s for s in range(t) if depth[s] < d and torch.rand((), generator=random) < 0.5]
        edges[t] = {s: float(torch.randn((), generator=random)) for s in lower}
        if draw[1] < 0.5:
            rest[t] = (float(draw[2]), -float(draw[3]))
    weights = torch.zeros(len(kind), dtype=torch.float64)
    weights[-3:] = torch.tensor([0.6, 0.2, 0.1])
    return Graph(nodes_of(kind, depth), rows_of(edges, rest), weights)


class Dense(NamedTuple):
    """The definitions by matrices; column n is whatever is not in a row."""

    shares: Tensor
    influence: Tensor
    flow: Tensor
    ends: Tensor


def dense(graph: Graph) -> Dense:
    nodes, rows, weights = graph
    n = len(nodes)
    shares = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for i, t in enumerate(rows.target.tolist()):
        for e in range(int(rows.start[i]), int(rows.start[i + 1])):
            shares[t, int(rows.source[e])] = abs(float(rows.weight[e]))
        shares[t, n] = float(rows.rest_positive[i]) - float(rows.rest_negative[i])
        total = shares[t].sum()
        if total > 0:
            shares[t] /= total
        else:
            shares[t, n] = 1.0
    eye = torch.eye(n + 1, dtype=torch.float64)
    paths = torch.linalg.inv(eye - shares) - eye
    start = torch.cat([weights / weights.sum(), torch.zeros(1, dtype=torch.float64)])
    found = start @ paths
    unexplored = nodes.kind == FEATURE
    unexplored[rows.target.long()] = False
    errors = torch.cat([(nodes.kind == ERROR) | unexplored, torch.tensor([True])])
    return Dense(shares, found[:n], found + start, errors)


@pytest.fixture(params=range(6))
def graph(request: Any) -> Graph:
    return random_graph(request.param)


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take few edges at once, so that rows of one depth come in several parts."""
    monkeypatch.setattr(module, "EDGES_AT_ONCE", 30)


def test_influence_is_that_of_the_dense_definition(graph: Graph) -> None:
    torch.testing.assert_close(influence_of(*graph), dense(graph).influence, **CLOSE)


def test_scores_are_those_of_the_dense_definition(graph: Graph) -> None:
    nodes, rows, _ = graph
    wanted = dense(graph)
    token = float(wanted.influence[nodes.kind == EMBED].sum())
    n = len(nodes)
    wrong = float(wanted.flow[wanted.ends].sum())
    has_row = torch.zeros(n + 1, dtype=torch.bool)
    has_row[rows.target.long()] = True
    share_of_errors = wanted.shares @ wanted.ends.double()
    flow = wanted.flow[has_row]
    complete = float((flow * (1 - share_of_errors[has_row])).sum() / flow.sum())
    found = scores(*graph)
    assert found.replacement == pytest.approx(token / (token + wrong), rel=1e-6)
    assert found.completeness == pytest.approx(complete, rel=1e-6)
    assert found.token == pytest.approx(token, rel=1e-6)
    assert found.not_shown > 0


def test_every_path_ends_somewhere(graph: Graph) -> None:
    found = scores(*graph)
    assert found.token + found.bias + found.error + found.not_shown == pytest.approx(1, rel=1e-9)


def test_a_target_without_a_row_is_not_shown(graph: Graph) -> None:
    """Its weight vanished: what the four shares add up to was less than 1."""
    nodes, rows, weights = graph
    more = weights.clone()
    lacking = (nodes.kind == FEATURE).nonzero()[:, 0].tolist()
    lacking = [i for i in lacking if i not in rows.target.tolist()]
    more[lacking[0]] = 0.5
    found = scores(nodes, rows, more)
    assert found.token + found.bias + found.error + found.not_shown == pytest.approx(1, rel=1e-9)


def test_three_nodes_by_hand() -> None:
    """A logit takes 3 of a feature and -1 of the embedding, the feature 2 of the embedding."""
    nodes = nodes_of([EMBED, FEATURE, LOGIT], [0, 1, 2])
    rows = rows_of({1: {0: 2.0}, 2: {1: 3.0, 0: -1.0}}, {})
    weights = torch.tensor([0.0, 0.0, 0.9])
    torch.testing.assert_close(
        influence_of(nodes, rows, weights), torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64)
    )
    found = scores(nodes, rows, weights)
    assert (found.replacement, found.completeness, found.not_shown) == (1, 1, 0)


def test_what_is_not_explained_is_error_by_hand() -> None:
    """The same with an error of 1 in the feature, and as much again in the logit's rest.

    logit: 3 of the feature, 1 of the embedding, 2 + 2 of the rest; feature: 2 and 1 of the error.
    """
    nodes = nodes_of([EMBED, ERROR, FEATURE, LOGIT], [0, 1, 2, 3])
    rows = rows_of({2: {0: 2.0, 1: 1.0}, 3: {2: 3.0, 0: -1.0}}, {3: (2.0, -2.0)})
    found = scores(nodes, rows, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    feature, rest = 3 / 8, 4 / 8
    token = 1 / 8 + feature * 2 / 3
    assert found.token == pytest.approx(token)
    assert found.error == pytest.approx(feature / 3)
    assert found.not_shown == pytest.approx(rest)
    assert found.replacement == pytest.approx(token)
    complete = (1 * (1 - rest) + feature * (1 - 1 / 3)) / (1 + feature)
    assert found.completeness == pytest.approx(complete)
    without = rows_of({3: {2: 3.0, 0: -1.0}}, {3: (2.0, -2.0)})
    unexplored = scores(nodes, without, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert unexplored.replacement == pytest.approx(1 / 8)
    assert unexplored.not_shown == pytest.approx(rest + feature)


def _pruned(graph: Graph, node_threshold: float, edge_threshold: float) -> set[tuple[int, int]]:
    """Return the edges that are kept, by sorting everything."""
    nodes, _rows, weights = graph
    wanted = dense(graph)
    stays = (nodes.kind == EMBED) | (weights > 0)

    def fewest(values: Tensor, share: float) -> Tensor:
        if share == 1:
            return values > 0
        ranked = values.sort(descending=True).values
        return values >= ranked[int((ranked.cumsum(0) < share * ranked.sum()).sum())]

    errors = nodes.kind == ERROR
    kept = stays
    for some in (errors, ~errors):
        kept = kept | (fewest(wanted.influence * some, node_threshold) & some)
    n = len(nodes)
    shares = wanted.shares.clone()
    gone = shares[:, :n] * ~kept
    shares[:, n] += gone.sum(1)
    shares[:, :n] -= gone
    shares[:n] *= kept[:, None]
    eye = torch.eye(n + 1, dtype=torch.float64)
    start = torch.cat([weights / weights.sum(), torch.zeros(1, dtype=torch.float64)])
    flow = start @ torch.linalg.inv(eye - shares)
    strength = (shares * flow[:, None])[:n, :n]
    edges = fewest(strength.flatten(), edge_threshold).view(n, n)
    while True:
        edges = edges & kept[:, None] & kept[None, :]
        now = kept & (stays | edges.any(0)) & (stays | (nodes.kind != FEATURE) | edges.any(1))
        if torch.equal(now, kept):
            return {(t, s) for t, s in edges.nonzero().tolist()}
        kept = now


@pytest.mark.parametrize(("node", "edge"), [(0.8, 0.98), (0.5, 0.7), (0.95, 0.5), (1.0, 1.0)])
def test_pruning_keeps_what_a_sort_keeps(graph: Graph, node: float, edge: float) -> None:
    found = prune(*graph, node_threshold=node, edge_threshold=edge)
    rows = found.rows
    edges = {
        (t, s)
        for i, t in enumerate(rows.target.tolist())
        for s in rows.source[int(rows.start[i]) : int(rows.start[i + 1])].tolist()
    }
    assert edges == _pruned(graph, node, edge)
    ends = {node for edge in edges for node in edge}
    kept = set(found.nodes.nonzero()[:, 0].tolist())
    nodes, weights = graph.nodes, graph.weights
    assert ends <= kept
    assert all(nodes.kind[i] == EMBED or weights[i] > 0 for i in kept - ends)
    assert all(nodes.kind[i] != FEATURE or any(t == i for t, _ in edges) for i in kept)


def test_what_is_pruned_counts_as_error(graph: Graph) -> None:
    """Rows stay as large as they were, so the scores fall; cut first, they would rise."""
    before = scores(*graph)
    found = prune(*graph, node_threshold=0.7, edge_threshold=0.9)
    after = scores(graph.nodes, found.rows, graph.weights)
    assert after.replacement <= before.replacement + 1e-9
    assert after.completeness < before.completeness
    assert after.not_shown > before.not_shown
    whole, rows = graph.rows, found.rows
    for i, target in enumerate(rows.target.tolist()):
        j = whole.target.tolist().index(target)
        parts = []
        for each, at in ((rows, i), (whole, j)):
            weight = each.weight[int(each.start[at]) : int(each.start[at + 1])].double()
            parts.append(weight.sum() + each.rest_positive[at] + each.rest_negative[at])
        assert float(parts[0]) == pytest.approx(float(parts[1]), abs=1e-5)


def test_nothing_is_pruned_at_one_but_what_leads_nowhere(graph: Graph) -> None:
    found = prune(*graph, node_threshold=1.0, edge_threshold=1.0)
    influence = influence_of(*graph)
    lost = graph.nodes.kind == FEATURE
    lost[graph.rows.target[graph.rows.start.diff() > 0].long()] = False
    assert not found.nodes[lost].any()
    stays = (influence > 0) & ~lost
    assert bool((found.nodes | ~stays).all())


def test_cumulative_is_the_share_of_stronger_nodes() -> None:
    found = cumulative(torch.tensor([1.0, 4.0, 0.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 1.0, 0.875]))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("seed", range(4))
def test_bounds_are_those_of_a_sort(share: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = (torch.randn(5000, generator=random) * (1 + seed)).exp().double()
    values[::7] = 0
    ranked = values.sort(descending=True).values
    place = int((ranked.cumsum(0) < share * ranked.sum()).sum())
    assert _least_of(lambda: values.split(999), share) == float(ranked[place])
    assert _least_of(lambda: [torch.zeros(3)], share) == torch.inf


def test_a_share_of_one_keeps_all_that_is_there() -> None:
    values = torch.tensor([1e-30, 3.0, 0.0, 1e-12])
    assert fewest(values, 1.0).tolist() == [True, True, False, True]


def test_equal_values_are_kept_together() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5])
    assert _least_of(lambda: [values], 0.5) == 1.0


class Largest(TorchDispatchMode):
    """The largest tensor that anything returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor):
                self.n = max(self.n, each.numel())
        return found


def test_no_tensor_is_larger_than_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is linear: with n^2 numbers for n nodes, this would be 250 times as much."""
    monkeypatch.setattr(module, "EDGES_AT_ONCE", 1 << 10)
    random = torch.Generator().manual_seed(0)
    n_depths, width, each = 10, 400, 16
    kind = [EMBED] * width + [FEATURE] * width * (n_depths - 1) + [LOGIT]
    depth = [d for d in range(n_depths) for _ in range(width)] + [n_depths]
    m = width * (n_depths - 1) + 1
    target = torch.arange(width, width + m, dtype=torch.int32)
    first = torch.tensor(depth)[width:] * width
    source = (torch.rand(m, each, generator=random) * first[:, None]).int()
    rows = Rows(
        target=target,
        start=torch.arange(m + 1) * each,
        source=source.flatten(),
        weight=torch.randn(m * each, generator=random),
        rest_positive=torch.ones(m),
        rest_negative=-torch.ones(m),
        constant=torch.zeros(m),
        total=torch.zeros(m),
    )
    nodes = nodes_of(kind, depth)
    weights = torch.zeros(len(nodes))
    weights[-1] = 1
    with Largest() as largest:
        found = prune(nodes, rows, weights, node_threshold=0.8, edge_threshold=0.98)
        scores(nodes, found.rows, weights)
    assert largest.n <= max(len(rows.source), 1 << (31 - module.DROPPED_BITS))


def test_a_sweep_of_rows_as_they_come_is_that_of_all(graph: Graph) -> None:
    """Rows of one depth are taken as soon as they are made: the flow to it is final then."""
    nodes, rows, weights = graph
    sweep = Sweep(nodes, weights)
    depth = nodes.depth[rows.target.long()]
    for d in reversed(depth.unique().tolist()):
        (at,) = torch.where(depth == d)
        lo, hi = int(at[0]), int(at[-1]) + 1
        ends = slice(int(rows.start[lo]), int(rows.start[hi]))
        sweep.take(
            Rows(
                target=rows.target[lo:hi],
                start=rows.start[lo : hi + 1] - rows.start[lo],
                source=rows.source[ends],
                weight=rows.weight[ends],
                rest_positive=rows.rest_positive[lo:hi],
                rest_negative=rows.rest_negative[lo:hi],
                constant=rows.constant[lo:hi],
                total=rows.total[lo:hi],
            )
        )
    torch.testing.assert_close(sweep.influence, influence_of(*graph), rtol=1e-12, atol=0)


def test_a_graph_that_is_no_dag_by_depth_is_refused() -> None:
    nodes = nodes_of([EMBED, FEATURE, FEATURE, LOGIT], [0, 1, 1, 2])
    weights = torch.tensor([0.0, 0.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="no lower"):
        influence_of(nodes, rows_of({2: {1: 1.0}, 3: {2: 1.0}}, {}), weights)
    rows = rows_of({2: {0: 1.0}, 3: {2: 1.0}}, {})
    swapped = rows._replace(target=rows.target.flip(0))
    with pytest.raises(ValueError, match="order"):
        influence_of(nodes, swapped, weights)
