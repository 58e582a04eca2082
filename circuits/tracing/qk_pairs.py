"""Pairs of nodes by which one key beats the others in a head's score.

    centred score = score(q, k*) - sum_k P(q, k) score(q, k)

With the norms' scales frozen, queries and keys are sums over nodes, so the centred score is one
over pairs, node s as read at the query and node s' as read at the keys:

    sum over s, s' of <q_s, sum_k c_k slope_k k_s'> + constant        c_k = [k = k*] - P(q, k)

slope is the scale of the scores, times the derivative of a cap. A pair's value is the derivative of
log P(q, k*) by the size of its product: to first order, that is lower by it without the pair.
Pairs are signed: one at k* speaks for k* if its product is positive, one at another key if it is
negative. The sides are factors of width d_head, so that what all pairs of a node add up to needs no
pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import AnalyzeError
from .pairing import KEEP, MOST_PAIRS, Paired, Pairs, Parts
from .qk_head import Head, Row

CONSTANT = -1
"""Node of what no node makes: biases of projections and norms."""


class Reader(Protocol):
    """The nodes that a layer's input x is made of."""

    def __call__(self, maps: Tensor, first: int) -> Iterator[Parts]:
        """Yield what nodes add to the sum over positions of x[p] maps[p - first], each node once.

        Args:
            maps: of x after the norm in front of the layer, without the norm's bias, at positions
                first, first + 1, ..., [n_pos, d_model, width].
            first: the first position.

        Yields:
            Nodes, int64 [n], and what each adds, [n, width].
        """


class QKTrace(NamedTuple):
    """The centred score of one head, query and key, taken apart."""

    layer: int
    head: int
    """Query head of the layer, or QK head of the Lorsa in its place"""
    query: int
    """Position of the query"""
    key: int
    """Position of the key, k*"""
    score: float
    """Score of query and key before the softmax, after scale and cap"""
    centred: float
    """The score less the mean of all scores under the pattern"""
    constant: float
    """Part of it without nodes: linear biases, what caps leave, and a sink as a competitor"""
    scores: Tensor
    """Score of the query with every key, -inf where it may not look, [T]"""
    pattern: Tensor
    """P(q, k), [T]"""
    weight: Tensor
    """c_k slope_k, by which products with each key are multiplied, [T]"""
    query_node: Tensor
    """Nodes as read at the query, int64 [n]; the last is CONSTANT"""
    query_value: Tensor
    """Sum of each one's pairs, [n]"""
    key_node: Tensor
    """Nodes as read at keys, int64 [m]; the last is CONSTANT"""
    key_value: Tensor
    """Sum of each one's pairs, [m]; those at competitors have -P(q, k) in them"""
    positive: Pairs
    negative: Pairs
    rest_positive: float
    """Sum of the positive pairs that are not kept"""
    rest_negative: float
    """Sum of the negative pairs that are not kept"""
    unpaired: float
    """Sum of the pairs with one of the smallest nodes of a side, where there are too many"""
    gap: float
    """Largest difference of these sums, over query nodes, key nodes and pairs, from the centred
    score less its constant; relative to the sum of |c_k score(q, k)|"""

    def by_position(self) -> Tensor:
        """Return what each key adds to the centred score, [T]: c_k score(q, k), 0 where hidden."""
        return _weights(self.pattern, self.key) * _finite(self.scores)

    def competitors(self, most: int = 5) -> Tensor:
        """Return the keys besides k* that take the most of the pattern, int64 [<= most].

        Each lowers the centred score by P(q, k) score(q, k), and k* has to beat it by
        score(q, k*) - score(q, k).
        """
        others = self.pattern.clone()
        others[self.key] = 0
        order = others.argsort(descending=True, stable=True)[:most]
        return order[others[order] > 0]

    def pattern_without(self, value: float, position: int) -> Tensor:
        """Return the pattern without a pair of nodes whose node at the keys is read at one key.

        P'(q, p) = P(q, p) f / (1 - P(q, position) + P(q, position) f), f 1 but at that key

        Args:
            value: of the pair, or the sum of several.
            position: the key, one with a weight.

        Returns:
            [T]; exact without a cap, whose slope is held.
        """
        c, mine = _weights(self.pattern, self.key)[position], self.pattern[position]
        factor = torch.exp(-value / c)
        pattern = self.pattern.clone()
        pattern[position] *= factor
        return pattern / (1 - mine + mine * factor)


class Asked(NamedTuple):
    """One head, query and key of a layer."""

    layer: int
    head: int
    query: int
    key: int | None = None
    """None takes the key that the pattern is largest at"""


@torch.no_grad()
def pair_up(
    head: Head, asked: Asked, reader: Reader, *, keep: int = KEEP, most: int = MOST_PAIRS
) -> QKTrace:
    """Take the centred score of a head, a query and a key apart.

    Args:
        head: frozen at the prompt.
        asked: which head of which layer it is, and of which query and key.
        reader: the nodes that its layer's input is made of.
        keep: pairs of each sign that are kept.
        most: pairs that are made at most.

    Raises:
        AnalyzeError: the query is outside the prompt, or does not see the key.
    """
    query = asked.query
    row = _row(head, query, asked.key)
    key = int(row.pattern.argmax()) if asked.key is None else asked.key
    c = _weights(row.pattern, key)
    weight = c * row.slope
    at_query, at_keys = _query_side(head, query, reader), _key_side(head, query, weight, reader)
    d_head = head.keys.W.shape[1]
    query_value = at_query[1] @ (weight @ head.k[:, :d_head])
    key_value = at_keys[1] @ head.q[query, :d_head]
    paired, sums = Paired.of(at_query, at_keys, keep=keep, most=most), _Sums.of(row, c, head.sink)
    return QKTrace(
        **asked._asdict() | {"key": key},
        score=float(row.score[key]),
        centred=sums.centred,
        constant=sums.centred - sums.from_nodes,
        scores=row.score,
        pattern=row.pattern,
        weight=weight,
        query_node=at_query[0],
        query_value=query_value,
        key_node=at_keys[0],
        key_value=key_value,
        positive=paired.positive.pairs(1),
        negative=paired.negative.pairs(-1),
        rest_positive=paired.positive.rest(),
        rest_negative=-paired.negative.rest(),
        unpaired=paired.unpaired,
        gap=sums.gap(float(query_value.sum()), float(key_value.sum()), paired.total()),
    )


def _row(head: Head, query: int, key: int | None) -> Row:
    """Return the scores of a query; AnalyzeError if it does not exist or see the key."""
    length = len(head.q)
    if not 0 <= query < length:
        raise AnalyzeError(f"query is {query}; the prompt has positions 0-{length - 1}")
    row = head.row(query)
    if key is not None and not (0 <= key < length and row.score[key].isfinite()):
        keys = row.score.isfinite().nonzero()[:, 0]
        seen = f"{int(keys[0])}-{int(keys[-1])}"
        raise AnalyzeError(f"key is {key}, which query {query} does not see; it sees {seen}")
    return row


def _weights(pattern: Tensor, key: int) -> Tensor:
    """Return c, the weights of the scores in the centred score, [T]."""
    c = -pattern
    c[key] += 1
    return c


def _finite(scores: Tensor) -> Tensor:
    """Return scores with 0 for those of hidden keys."""
    return scores.masked_fill(scores.isinf(), 0)


def _query_side(head: Head, query: int, reader: Reader) -> Parts:
    """Return nodes, and their parts of the query; CONSTANT is last."""
    maps = head.queries.linear(query, query + 1)
    return _whole(reader(maps, query), head.queries.constant(query, query + 1)[0])


def _key_side(head: Head, query: int, weight: Tensor, reader: Reader) -> Parts:
    """Return nodes, and their parts of the weighted sum of keys; CONSTANT is last."""
    first = int(weight.nonzero()[0]) if weight.any() else query
    mine = weight[first : query + 1]
    maps = head.keys.linear(first, query + 1) * mine[:, None, None]
    return _whole(reader(maps, first), mine @ head.keys.constant(first, query + 1))


def _whole(pieces: Iterator[Parts], constant: Tensor) -> Parts:
    """Return the nodes of all pieces with CONSTANT, whose part is given, [d_head]."""
    nodes, parts = zip(*pieces, strict=True)
    own = nodes[0].new_full((1,), CONSTANT)
    return torch.cat([*nodes, own]), torch.cat([*parts, constant[None]])


class _Sums(NamedTuple):
    """Sums over the keys of a query, in float64."""

    centred: float
    from_nodes: float
    """The centred score less its constant"""
    size: float
    """Sum of |c_k score(q, k)|"""

    @classmethod
    def of(cls, row: Row, c: Tensor, sink: Tensor | None) -> "_Sums":
        """Return those of a row of scores with weights c, [T]."""
        by_key = c.double() * _finite(row.score).double()
        products = c.double() * row.slope.double() * row.product.double()
        lost = 0.0 if sink is None else float((1 - row.pattern.double().sum()) * sink.double())
        return cls(float(by_key.sum()) - lost, float(products.sum()), float(by_key.abs().sum()))

    def gap(self, *sums: float) -> float:
        """Return how far sums over nodes are from what they should come to, relative to size."""
        most = max(abs(each - self.from_nodes) for each in sums)
        return most / max(self.size, torch.finfo(torch.float64).tiny)
