"""Pairs of nodes on two sides: the largest of each sign, and the sums of the rest.

The value of a pair is the product of the part that a node makes of one side, the query, and the
part that a node makes of the other, the weighted sum of keys. They are made in blocks, so that
memory is bounded.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

KEEP = 64
"""Pairs of each sign that are kept."""
MOST_NODES = 1 << 14
"""Nodes of the query, and of the keys that are read at once, that are paired at most."""
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
    """The nodes at the keys, and their pairs with those at the query."""

    node: Tensor
    """int64 [m]"""
    value: Tensor
    """Product of the query and each one's part, [m]"""
    positive: "Largest"
    negative: "Largest"
    """The same of the values' negatives"""
    unpaired: float
    """Sum of the pairs that were not made"""

    @classmethod
    def of(
        cls,
        at_query: Parts,
        at_keys: Iterator[Parts],
        q: Tensor,
        *,
        keep: int,
        most: int,
    ) -> "Paired":
        """Go through the nodes at the keys, block by block.

        Args:
            at_query, at_keys: nodes, and their parts, [n, d_head].
            q: the query, [d_head].
            keep: pairs of each sign that are kept.
            most: nodes of the query, and of each block of the keys, that are paired.
        """
        best, left = (Largest(keep), Largest(keep)), 0.0
        nodes, values = [], []
        some_q, rest_q = _largest(*at_query, most)
        all_q = at_query[1].sum(dim=0)
        for block in at_keys:
            some_k, rest_k = _largest(*block, most)
            _pair(best, some_q, some_k)
            left += float(all_q @ rest_k + rest_q @ some_k[1].sum(dim=0))
            nodes.append(block[0])
            values.append(block[1] @ q)
        return cls(torch.cat(nodes), torch.cat(values), *best, left)

    def paired(self) -> float:
        """Return the sum of all pairs that were made."""
        return self.positive.total - self.negative.total


def _largest(nodes: Tensor, parts: Tensor, most: int) -> tuple[Parts, Tensor]:
    """Return the nodes with the largest parts, with these, and the sum of all others' parts."""
    if len(nodes) <= most:
        return (nodes, parts), torch.zeros_like(parts[0])
    chosen = parts.norm(dim=1).topk(most).indices
    mine = parts[chosen]
    return (nodes[chosen], mine), parts.sum(dim=0) - mine.sum(dim=0)


def _pair(
    best: tuple["Largest", "Largest"],
    query: Parts,
    key: Parts,
) -> None:
    """Consider the pairs of a query's nodes and some of the keys', block by block.

    Args:
        best: the largest pairs so far, and the largest of their negatives.
        query, key: nodes, [n], and their parts, [n, d_head].
    """
    (q_nodes, q_parts), step = query, max(1, BLOCK_PAIRS // len(query[0]))
    for nodes, parts in zip(*(each.split(step) for each in key), strict=True):
        values = q_parts @ parts.T
        best[0].add(values, q_nodes, nodes)
        best[1].add(-values, q_nodes, nodes)


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
