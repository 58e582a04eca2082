"""Pairs of nodes on two sides: the largest of each sign, and the sums of the rest.

The value of a pair is the product of the part that a node makes of one side, the query, and the
part that a node makes of the other, the weighted sum of keys. They are made in blocks, so that
memory is bounded.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

KEEP = 64
"""Pairs of each sign that are kept."""
MOST_PAIRS = 1 << 29
"""Pairs that are made at most."""
BLOCK_PAIRS = 4 << 20
"""Pairs whose values are in memory at once."""

Parts = tuple[Tensor, Tensor]
"""Nodes, int64 [n], and the part of a query or of keys that each makes, [n, d_head]."""


class Pairs(NamedTuple):
    """Pairs of a node at the query and a node at the keys, largest |value| first."""

    query_node: Tensor
    """int64 [m]"""
    key_node: Tensor
    """int64 [m]"""
    value: Tensor
    """What each adds to the centred score, [m]"""


class Paired(NamedTuple):
    """Pairs of nodes on two sides."""

    positive: "Largest"
    negative: "Largest"
    """The same of the values' negatives"""
    unpaired: float
    """Sum of the pairs that were not made"""

    @classmethod
    def of(cls, query: Parts, keys: Parts, *, keep: int, most: int) -> "Paired":
        """Pair the nodes of two sides, block by block.

        Args:
            query, keys: nodes of each side, and their parts.
            keep: pairs of each sign that are kept.
            most: pairs that are made at most, of the nodes with the largest parts.
        """
        n_query, n_keys = _sizes(len(query[0]), len(keys[0]), most)
        (q_nodes, q_parts), q_rest = _largest(query, n_query)
        key, k_rest = _largest(keys, n_keys)
        positive, negative = Largest(keep), Largest(keep)
        step = max(1, BLOCK_PAIRS // n_query)
        for k_nodes, k_parts in zip(*(each.split(step) for each in key), strict=True):
            values = q_parts @ k_parts.T
            positive.add(values, q_nodes, k_nodes)
            negative.add(-values, q_nodes, k_nodes)
        left = query[1].sum(dim=0) @ k_rest + q_rest @ key[1].sum(dim=0)
        return cls(positive, negative, float(left))

    def total(self) -> float:
        """Return the sum of all pairs."""
        return self.positive.total - self.negative.total + self.unpaired


def _sizes(n_query: int, n_keys: int, most: int) -> tuple[int, int]:
    """Return how many nodes of each side are paired, so that there are no more than most pairs."""
    if n_query * n_keys <= most:
        return n_query, n_keys
    n_query = min(n_query, max(1, math.isqrt(most), most // n_keys))
    return n_query, min(n_keys, max(1, most // n_query))


def _largest(side: Parts, n: int) -> tuple[Parts, Tensor]:
    """Return the n nodes with the largest parts, with these, and the sum of all others' parts."""
    nodes, parts = side
    if len(nodes) <= n:
        return side, torch.zeros_like(parts[0])
    chosen = parts.norm(dim=1).topk(n).indices
    mine = parts[chosen]
    return (nodes[chosen.to(nodes.device)], mine), parts.sum(dim=0) - mine.sum(dim=0)


class Largest:
    """The largest of many pairs, and the sum of all that are positive."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.total = 0.0
        self.least = 0.0
        """Value that a pair has to exceed to be kept"""
        self.value = torch.empty(0)
        self.where = torch.empty(2, 0, dtype=torch.long)
        """Query node and key node of each"""

    def add(self, values: Tensor, q_nodes: Tensor, k_nodes: Tensor) -> None:
        """Consider pairs, [n_query, n_key]."""
        self.total += float(values.clamp(min=0).sum(dtype=torch.float64))
        rows, columns = (values > self.least).nonzero(as_tuple=True)
        found = torch.stack([q_nodes[rows.to(q_nodes.device)], k_nodes[columns.to(k_nodes.device)]])
        value = torch.cat([self.value.to(values), values[rows, columns]])
        where = torch.cat([self.where, found.cpu()], dim=1)
        self.value, best = value.topk(min(self.keep, len(value)))
        best = best.cpu()
        self.where = where[:, best]
        if len(best) == self.keep > 0:
            self.least = float(self.value[-1])

    def pairs(self, sign: int) -> Pairs:
        """Return the pairs that are kept, their values times a sign."""
        return Pairs(self.where[0], self.where[1], sign * self.value)

    def rest(self) -> float:
        """Return the sum of the positive ones that are not kept."""
        return max(0.0, self.total - float(self.value.sum(dtype=torch.float64)))
