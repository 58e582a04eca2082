"""Edges of a trace: what each node adds to the pre-activation of a target, in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import Frozen
from .nodes import Nodes
from .sources import Sources
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
    kept = _Kept.nothing(targets, len(nodes) if keep is None else keep)
    for found in found_of(sources, targets.long().cpu()):
        kept.take(found)
    return kept.rows(nodes)


class _Kept(NamedTuple):
    """What is kept of rows as they are found, in any order."""

    targets: Tensor
    keep: int
    which: list[Tensor]
    """Which of the targets, a piece for each batch, [n]"""
    source: list[Tensor]
    """[n, kept], alike"""
    weight: list[Tensor]
    beside: list[Tensor]
    """Positive rest, negative rest and constant, [n, 3], alike"""

    @classmethod
    def nothing(cls, targets: Tensor, keep: int) -> "_Kept":
        return cls(targets, keep, [], [], [], [])

    def take(self, found: Found) -> None:
        """Keep the largest contributions of some rows, and the sums of the rest."""
        weights = found.made.weights
        n_kept = min(self.keep, weights.shape[1])
        columns = weights.abs().topk(n_kept, dim=1).indices
        self.weight.append(weights.gather(1, columns).cpu())
        self.source.append(found.made.nodes.to(columns.device)[columns].int().cpu())
        weights.scatter_(1, columns, 0)
        rest = [weights.clamp(min=0).sum(dim=1), weights.clamp(max=0).sum(dim=1)]
        self.beside.append(torch.stack([*rest, found.constant], dim=1).cpu())
        self.which.append(found.rows)

    def rows(self, nodes: Nodes) -> Rows:
        """Return all rows in the order of the targets."""
        order = torch.cat(self.which).argsort()
        n_edges = torch.cat([(weight != 0).sum(dim=1) for weight in self.weight])[order]
        start = torch.cat([torch.zeros(1, dtype=torch.long), n_edges.cumsum(0)])
        source = torch.empty(int(start[-1]), dtype=torch.int32)
        weight = torch.empty(int(start[-1]), dtype=self.weight[0].dtype)
        for which, some, weights in zip(self.which, self.source, self.weight, strict=True):
            is_edge = weights != 0
            place = start[which][:, None] + is_edge.cumsum(dim=1) - 1
            source[place[is_edge]], weight[place[is_edge]] = some[is_edge], weights[is_edge]
        beside = torch.cat(self.beside)[order]
        return Rows(
            target=self.targets.int(),
            start=start,
            source=source,
            weight=weight,
            rest_positive=beside[:, 0],
            rest_negative=beside[:, 1],
            constant=beside[:, 2],
            total=nodes.value[self.targets],
        )
