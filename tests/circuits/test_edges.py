"""Edges in closed form against autograd on the frozen model, and what rows add up to."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from lorsa.circuits.tracing.edges import Rows, edges
from lorsa.circuits.tracing.frozen import Frozen
from lorsa.circuits.tracing.nodes import EMBED, FEATURE, KINDS, LOGIT, Nodes
from lorsa.circuits.tracing.reference import Reference, reference
from lorsa.circuits.tracing.sources import find_nodes
from tiny import FAMILIES, LATENTS
from torch import Tensor
from traces import CASES, frozen_in


class Case(NamedTuple):
    frozen: Frozen
    nodes: Nodes
    targets: Tensor
    rows: Rows
    made: Tensor
    """Contributions as the rows have them, [m, n_nodes]"""
    exact: Reference


@cache
def _case(family: str, dtype: torch.dtype) -> Case:
    frozen = frozen_in(family, CASES[family]).to(dtype)
    nodes = find_nodes(frozen)
    targets = ((nodes.kind == FEATURE) | (nodes.kind == LOGIT)).nonzero()[:, 0]
    rows = edges(frozen, nodes, targets)
    return Case(frozen, nodes, targets, rows, dense(rows, nodes), reference(frozen, nodes, targets))


def dense(rows: Rows, nodes: Nodes) -> Tensor:
    """Return edges as a matrix, [m, n_nodes]."""
    row = torch.repeat_interleave(torch.arange(len(rows.target)), rows.start.diff())
    made = torch.zeros(len(rows.target), len(nodes), dtype=rows.weight.dtype)
    return made.index_put((row, rows.source.long()), rows.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", CASES)
def test_edges_are_those_of_autograd_by_kind_of_node(family: str, dtype: torch.dtype) -> None:
    """Each kind of target, by module, from each kind of source."""
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    case = _case(family, dtype)
    depths, seen = case.nodes.depth[case.targets], set()
    for depth in depths.unique().tolist():
        for kind in case.nodes.kind.unique().tolist():
            here = (depths == depth).nonzero(), (case.nodes.kind == kind).nonzero().T
            made, exact = case.made[here], case.exact.weights[here]
            assert float((made - exact).norm()) <= limit * float(exact.norm()), KINDS[kind]
            if exact.any():
                seen.add(KINDS[kind])
    assert seen == set(KINDS) - {"logit"}


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in CASES])
def test_edges_are_those_of_autograd_in_every_other_family(family: str) -> None:
    """A few targets, behind an MLP with a skip connection and the model's own attention."""
    last = "transcoder" if family in LATENTS else "lorsa"
    frozen = frozen_in(family, {0: "skip", 1: "transcoder", 2: last}).to(torch.float64)
    nodes = find_nodes(frozen)
    targets = (nodes.kind == FEATURE).nonzero()[::9, 0]
    rows, exact = edges(frozen, nodes, targets), reference(frozen, nodes, targets)
    off = dense(rows, nodes) - exact.weights
    assert float(off.norm()) <= 1e-10 * float(exact.weights.norm())
    assert rows.deviation <= 1e-5


@pytest.mark.parametrize("family", CASES)
def test_rows_add_up_to_what_the_dictionary_computes(family: str) -> None:
    case = _case(family, torch.float32)
    summed = case.made.sum(dim=1) + case.rows.constant
    torch.testing.assert_close(summed, case.rows.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.exact.totals, case.rows.total, rtol=1e-4, atol=1e-5)
    assert case.rows.deviation <= 1e-5
    assert not case.rows.rest_positive.any()
    assert not case.rows.rest_negative.any()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("keep", [1, 7])
@pytest.mark.parametrize("block", [1 << 22, 300])
def test_rows_keep_their_largest_edges_and_the_sums_of_the_rest(
    family: str, keep: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at once, or a few nodes at a time, of which most do not reach the floor."""
    case = _case(family, torch.float64)
    monkeypatch.setattr("lorsa.circuits.tracing.sweep.BLOCK", block)
    monkeypatch.setattr("lorsa.circuits.tracing.edges.ENOUGH", 10)
    rows = edges(case.frozen, case.nodes, case.targets, keep=keep)
    made = dense(rows, case.nodes)
    largest = case.made.abs().topk(keep, dim=1)
    torch.testing.assert_close(made.abs().topk(keep, dim=1).values, largest.values)
    rest = case.made - made
    torch.testing.assert_close(rows.rest_positive, rest.clamp(min=0).sum(dim=1))
    torch.testing.assert_close(rows.rest_negative, rest.clamp(max=0).sum(dim=1))
    assert rows.deviation <= 1e-5
    weights = [rows.weight[a:b].abs() for a, b in zip(rows.start, rows.start[1:], strict=False)]
    assert all(len(each) <= keep and (each.diff() <= 0).all() for each in weights)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_batches_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets by fives and in another order, nodes in runs of two tokens or of eight."""
    case = _case(family, torch.float64)
    monkeypatch.setattr("lorsa.circuits.tracing.targets.MOST", 5)
    monkeypatch.setattr("lorsa.circuits.tracing.sweep.POSITIONS", 2)
    monkeypatch.setattr("lorsa.circuits.tracing.sweep.BLOCK", 40)
    order = torch.randperm(len(case.targets), generator=torch.Generator().manual_seed(0))
    rows = edges(case.frozen, case.nodes, case.targets[order])
    assert torch.equal(rows.target.long(), case.targets[order])
    torch.testing.assert_close(dense(rows, case.nodes), case.made[order])
    torch.testing.assert_close(rows.constant, case.rows.constant[order])


def test_sources_come_before_their_targets() -> None:
    """Of everything replaced, a transcoder's feature has sources at its own token alone."""
    case = _case("llama-gqa", torch.float32)
    nodes = case.nodes
    row, source = case.made.nonzero(as_tuple=True)
    target = case.targets[row]
    assert (nodes.depth[source] < nodes.depth[target]).all()
    assert (nodes.position[source] <= nodes.position[target]).all()
    is_mlp = nodes.depth[target] % 2 == 0
    at_once = nodes.position[source] == nodes.position[target]
    assert (at_once | (nodes.position[source] < 0))[is_mlp].all()
    assert not at_once[~is_mlp & (nodes.kind[source] == EMBED)].all()
