"""Heads of a trace whose choice of a key is taken apart: the most influential of its Lorsas.

Heads of a Lorsa that share a QK head share its pattern, so they are one here: a QK head at a query.
"""

from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from ...dictionaries.lorsa.module import Lorsa
from .frozen import Frozen
from .nodes import FEATURE, Nodes
from .qk import qk_pairs
from .qk_pairs import CONSTANT, Asked, QKTrace
from .tables import PAIRS

N_PAIRS = 32
"""Pairs of each sign, and nodes of each side, that are kept of a head."""
MOST_PAIRS = 1 << 24
"""Pairs that are made of a head at most."""


class Choice(NamedTuple):
    """A QK head of a Lorsa at a query, and why it looks where it looks."""

    made: QKTrace
    influence: float
    """Influence of its heads at the query"""


def choices(
    frozen: Frozen, nodes: Nodes, kept: Tensor, influence: Tensor, most: int
) -> list[Choice]:
    """Return the most influential QK heads of Lorsas, taken apart at their largest keys.

    Args:
        frozen: the run.
        nodes: all of its nodes, n of them.
        kept: nodes of the graph, bool, [n].
        influence: of every node, [n].
        most: QK heads, each at a query, at most.
    """
    found: dict[Asked, float] = {}
    for module in frozen.modules:
        if not isinstance(module.dictionary, Lorsa):
            continue
        c = module.dictionary.config
        at = (kept & (nodes.kind == FEATURE) & (nodes.depth == module.depth)).nonzero()[:, 0]
        heads = nodes.feature[at] // (c.n_ov_heads // c.n_qk_heads)
        for node, head in zip(at.tolist(), heads.tolist(), strict=True):
            asked = Asked((module.depth - 1) // 2, head, int(nodes.position[node]))
            found[asked] = found.get(asked, 0.0) + float(influence[node])
    ranked = sorted(found, key=lambda asked: -found[asked])[:most]
    return [
        Choice(
            qk_pairs(frozen, nodes, *asked, keep=N_PAIRS, most=MOST_PAIRS),
            found[asked],
        )
        for asked in ranked
    ]


def named(chosen: list[Choice], n: int) -> Tensor:
    """Return the nodes, of n, that pairs or sides of heads name, bool, [n]."""
    found = torch.zeros(n + 1, dtype=torch.bool)  # the last is CONSTANT's
    for choice in chosen:
        for _kind, query, key, _value in _rows(choice.made):
            found[query] = found[key] = True
    return found[:-1]


def pairs_table(chosen: list[Choice], number: Tensor) -> pa.Table:
    """Return pairs and sides in the schema PAIRS.

    Args:
        chosen: heads.
        number: of each node in what is written, [n].
    """
    rows = [
        {
            "layer": made.layer,
            "head": made.head,
            "query": made.query,
            "key": made.key,
            "kind": kind,
            "query_node": None if query == CONSTANT else int(number[query]),
            "key_node": None if key == CONSTANT else int(number[key]),
            "value": value,
        }
        for made, _influence in chosen
        for kind, query, key, value in _rows(made)
    ]
    return pa.Table.from_pylist(rows, PAIRS)


def head_facts(chosen: list[Choice]) -> list[dict[str, Any]]:
    """Return what trace.json says of heads that are taken apart."""
    return [
        {
            "layer": made.layer,
            "head": made.head,
            "query": made.query,
            "key": made.key,
            "influence": influence,
            "share": float(made.pattern[made.key]),
            "score": made.score,
            "centred": made.centred,
            "constant": made.constant,
            "rest_positive": made.rest_positive,
            "rest_negative": made.rest_negative,
            "unpaired": made.unpaired,
            "gap": made.gap,
            "competitors": [
                {"key": key, "share": float(made.pattern[key])}
                for key in made.competitors().tolist()
            ],
        }
        for made, influence in chosen
    ]


def _rows(made: QKTrace) -> list[tuple[str, int, int, float]]:
    """Return kind, query node, key node and value of what is kept of a head."""
    found: list[tuple[str, int, int, float]] = []
    for pairs in (made.positive, made.negative):
        ends = zip(pairs.query_node.tolist(), pairs.key_node.tolist(), strict=True)
        values = pairs.value.tolist()
        found += [("pair", *both, v) for both, v in zip(ends, values, strict=True)]
    for kind in ("query", "key"):
        nodes, values = getattr(made, f"{kind}_node"), getattr(made, f"{kind}_value")
        for i in values.abs().argsort(descending=True, stable=True)[:N_PAIRS].tolist():
            node = int(nodes[i])
            ends_of = (node, CONSTANT) if kind == "query" else (CONSTANT, node)
            found.append((kind, *ends_of, float(values[i])))
    return found
