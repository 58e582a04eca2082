"""Edges of a trace: what each node adds to the pre-activation of a target, in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import Frozen
from .nodes import Nodes
from .sources import Sources
from .targets import Found, found_of

ENOUGH = 1024
"""Candidates of a row among which the largest are looked for again."""


class Rows(NamedTuple):
    """Incoming edges of some targets, a row each, on the CPU.

    total = constant + sum of weight over the row + rest_positive + rest_negative, but for rounding.
    """

    target: Tensor
    """Index of each target among the nodes, int32, [m]"""
    start: Tensor
    """Row i is source[start[i] : start[i + 1]], and weight alike, int64, [m + 1]"""
    source: Tensor
    """Index of each source among the nodes, the largest |weight| of a row first, int32, [e]"""
    weight: Tensor
    """What the source adds to the target's pre-activation, signed, [e]"""
    rest_positive: Tensor
    """Sum of the positive contributions of all sources that are not listed, [m]"""
    rest_negative: Tensor
    """Sum of the negative ones, at most 0, [m]"""
    constant: Tensor
    """What no node makes: the target's own bias and that of the norm it reads through, [m]"""
    total: Tensor
    """Pre-activation as the dictionary itself computes it, or the logit, [m]"""

    @property
    def deviation(self) -> float:
        """Largest difference of a row's sum and its total, relative to what the row adds up.

        |constant + sum of weight + rest - total| / (|constant| + sum of |weight| + |rest|)
        """
        weight = self.weight.double()
        summed, size = (self._summed(part) for part in (weight, weight.abs()))
        beside = self.constant.double() + self.rest_positive + self.rest_negative
        around = self.constant.double().abs() + self.rest_positive - self.rest_negative
        off = (summed + beside - self.total).abs() / (size + around).clamp(min=1e-30)
        return float(off.max()) if len(off) else 0.0

    def _summed(self, values: Tensor) -> Tensor:
        """Return the sum of values of edges over each row, [m]."""
        row = torch.repeat_interleave(torch.arange(len(self.target)), self.start.diff())
        return values.new_zeros(len(self.target)).index_add(0, row, values)


@torch.no_grad()
def edges(frozen: Frozen, nodes: Nodes, targets: Tensor, *, keep: int | None = None) -> Rows:
    """Return the incoming edges of targets.

    Args:
        frozen: a run of a language model.
        nodes: all of its nodes, from `find_nodes`.
        targets: features and logits among the nodes, int64, [m].
        keep: edges of a row that are listed, the largest by |weight|; None lists all that are not
            0.

    Raises:
        AnalyzeError: a target is neither a feature nor a logit.
    """
    sources = Sources(frozen, nodes)
    n_kept = len(nodes) if keep is None else keep
    kept = [_kept(found, n_kept) for found in found_of(sources, targets.long().cpu())]
    return _rows([_Kept.nothing(frozen.embedded), *kept], targets, nodes)


class _Kept(NamedTuple):
    """What is kept of some rows."""

    rows: Tensor
    """Which of the targets, int64, [n]"""
    source: Tensor
    """[n, kept]"""
    weight: Tensor
    """The largest by size first, [n, kept]"""
    beside: Tensor
    """Positive rest, negative rest and constant, [n, 3]"""

    @classmethod
    def nothing(cls, like: Tensor) -> "_Kept":
        """Return what is kept of no rows."""
        none = torch.zeros(0, 0, dtype=torch.long)
        beside = torch.zeros(0, 3, dtype=like.dtype)
        return cls(none.flatten(), none.int(), none.to(like.dtype), beside)


class _Best:
    """The largest contributions so far, and the sums of all others.

    As soon as as many as are kept have been seen, the least of them is a floor: what does not
    reach it need not be sorted.
    """

    def __init__(self, n: int, keep: int, like: Tensor) -> None:
        self._keep = keep
        self._weights = [like.new_zeros(n, 0)]
        self._nodes = [torch.zeros(n, 0, dtype=torch.int32, device=like.device)]
        self._width = 0
        self._sum, self._size = like.new_zeros(n), like.new_zeros(n)
        self._floor: Tensor | None = None

    def take(self, weights: Tensor, nodes: Tensor) -> None:
        """Add contributions [n, m] of nodes [m]; they are changed."""
        nodes = nodes.to(weights.device)
        if weights.shape[1] > self._keep:
            size = weights.abs()
            row, column = self._candidates(size)
            best, nodes = _picked(weights, nodes, row, column)
            weights[row, column] = size[row, column] = 0
            self._sum += weights.sum(dim=1)
            self._size += size.sum(dim=1)
            weights = best
        self._weights.append(weights)
        self._nodes.append(nodes.expand_as(weights))
        self._width += weights.shape[1]
        if self._width > max(ENOUGH, 2 * self._keep):
            self._settle()

    def _candidates(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows, ascending, and columns of what may be among the largest, [n_candidates]."""
        if self._floor is not None:
            row, column = (size > self._floor[:, None]).nonzero(as_tuple=True)
            if len(row) <= size.shape[0] * self._keep:
                return row, column
        column = size.topk(self._keep, dim=1, sorted=False).indices.flatten()
        return torch.arange(len(size), device=size.device).repeat_interleave(self._keep), column

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights and nodes [n, kept], and the rest that is positive or negative, [n]."""
        weights, nodes = self._settle()
        rest = (self._size + self._sum) / 2, (self._sum - self._size) / 2
        return weights, nodes, *rest

    def _settle(self) -> tuple[Tensor, Tensor]:
        """Sort what is kept by size, let go what is too much, and return the rest."""
        weights, nodes = torch.cat(self._weights, dim=1), torch.cat(self._nodes, dim=1)
        order = weights.abs().sort(dim=1, descending=True, stable=True).indices
        lost = weights.gather(1, order[:, self._keep :])
        self._sum += lost.sum(dim=1)
        self._size += lost.abs().sum(dim=1)
        order = order[:, : self._keep]
        weights, nodes = weights.gather(1, order), nodes.gather(1, order)
        self._weights, self._nodes, self._width = [weights], [nodes], weights.shape[1]
        if self._width == self._keep:
            self._floor = weights[:, -1].abs()
        return weights, nodes


def _picked(weights: Tensor, nodes: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return chosen weights and their nodes, each row from the left, 0 where it has no more.

    Args:
        weights: [n, m].
        nodes: [m].
        row, column: of the chosen, rows ascending, int64.
    """
    counts = torch.bincount(row, minlength=len(weights))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = len(counts), int(counts.max())
    best, found = weights.new_zeros(shape), nodes.new_zeros(shape)
    best[row, place], found[row, place] = weights[row, column], nodes[column]
    return best, found


def _kept(found: Found, keep: int) -> _Kept:
    """Return the largest contributions to some rows, and the sums of the rest."""
    best = _Best(len(found.rows), keep, found.constant)
    for made in found.made:
        best.take(made.weights, made.nodes)
    weights, nodes, positive, negative = best.result()
    beside = torch.stack([positive, negative, found.constant], dim=1)
    return _Kept(found.rows, nodes.cpu(), weights.cpu(), beside.cpu())


def _rows(kept: list[_Kept], targets: Tensor, nodes: Nodes) -> Rows:
    """Return all rows in the order of the targets."""
    order = torch.cat([each.rows for each in kept]).argsort()
    n_edges = torch.cat([(each.weight != 0).sum(dim=1) for each in kept])[order]
    start = torch.cat([torch.zeros(1, dtype=torch.long), n_edges.cumsum(0)])
    source = torch.empty(int(start[-1]), dtype=torch.int32)
    weight = torch.empty(int(start[-1]), dtype=kept[0].weight.dtype)
    for each in kept:
        is_edge = each.weight != 0
        place = start[each.rows][:, None] + is_edge.cumsum(dim=1) - 1
        source[place[is_edge]] = each.source[is_edge]
        weight[place[is_edge]] = each.weight[is_edge]
    beside = torch.cat([each.beside for each in kept])[order]
    return Rows(
        target=targets.int(),
        start=start,
        source=source,
        weight=weight,
        rest_positive=beside[:, 0],
        rest_negative=beside[:, 1],
        constant=beside[:, 2],
        total=nodes.value[targets],
    )
