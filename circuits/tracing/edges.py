"""Edges of a trace: what each node adds to the pre-activation of a target, in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import Frozen
from .nodes import Nodes
from .sources import Sources
from .sweep import WIDTH
from .targets import Found, found_of


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
    """The largest contributions so far, and the sums of all others."""

    def __init__(self, n: int, keep: int, like: Tensor) -> None:
        self._keep = keep
        self._weights, self._nodes = like.new_zeros(n, 0), torch.zeros(n, 0).int().to(like.device)
        self._sum, self._size = like.new_zeros(n), like.new_zeros(n)

    def take(self, weights: Tensor, nodes: Tensor) -> None:
        """Add contributions [n, m] of nodes [n, m] or [m]; they are changed."""
        weights, nodes = self._largest(weights, nodes.to(weights.device), sort=False)
        self._weights = torch.cat([self._weights, weights], dim=1)
        self._nodes = torch.cat([self._nodes, nodes], dim=1)
        if self._weights.shape[1] > max(WIDTH, 2 * self._keep):
            self._settle()

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights and nodes [n, kept], and the rest that is positive or negative, [n]."""
        self._settle()
        rest = (self._size + self._sum) / 2, (self._sum - self._size) / 2
        return self._weights, self._nodes, *rest

    def _settle(self) -> None:
        self._weights, self._nodes = self._largest(self._weights, self._nodes, sort=True)

    def _largest(self, weights: Tensor, nodes: Tensor, *, sort: bool) -> tuple[Tensor, Tensor]:
        """Return the largest, by size; add the others to the sums."""
        n_kept = min(self._keep, weights.shape[1])
        if n_kept == weights.shape[1] and not sort:
            return weights, nodes.expand_as(weights)
        size = weights.abs()
        columns = size.topk(n_kept, dim=1, sorted=sort).indices
        best = weights.gather(1, columns)
        if n_kept < weights.shape[1]:
            self._sum += weights.scatter_(1, columns, 0).sum(dim=1)
            self._size += size.scatter_(1, columns, 0).sum(dim=1)
        return best, nodes.expand_as(weights).gather(1, columns)


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
