"""QK tracing: why a head of a frozen run looks at one key and not at the others.

The head is a QK head of a Lorsa, whose OV heads share it, or one of the model's own attention where
no Lorsa stands. Its layer's input is a sum over the nodes of the run: those written at the position
itself, and what the model's own attention of layers below carries there, its pattern frozen.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...dictionaries.lorsa.module import Lorsa
from ...errors import AnalyzeError
from .frozen import Frozen, Module
from .nodes import Nodes, attention_depth
from .pairing import KEEP, MOST_PAIRS, Parts
from .paths import OwnAttention
from .qk_head import Head
from .qk_pairs import Asked, QKTrace, pair_up
from .sources import Sources
from .sweep import swept


def qk_pairs(
    frozen: Frozen,
    nodes: Nodes,
    layer: int,
    head: int,
    query: int,
    key: int | None = None,
    *,
    keep: int = KEEP,
    most: int = MOST_PAIRS,
) -> QKTrace:
    """Take the centred score of a head, a query and a key apart, into pairs of nodes.

    Args:
        frozen: a run of a language model.
        nodes: all of its nodes, from `find_nodes`.
        layer: whose attention it is, counted from 0.
        head: QK head of the Lorsa that stands there, or query head of the layer.
        query: position of the query.
        key: position of the key; None takes the one that the pattern is largest at.
        keep: pairs of each sign that are kept.
        most: pairs that are made at most; where there are more, those with the smallest nodes of a
            side are in `unpaired`. Time goes by it.

    Raises:
        AnalyzeError: there is no such layer, head or query, or the query does not see the key.
    """
    module = _attention(frozen, layer)
    stream = _Stream(Sources(frozen, nodes), module)
    asked = Asked(layer, head, query, key)
    return pair_up(head_of(frozen, layer, head), asked, stream, keep=keep, most=most)


@torch.no_grad()
def head_of(frozen: Frozen, layer: int, head: int) -> Head:
    """Return a head of a run; arguments and errors as of `qk_pairs`."""
    module = _attention(frozen, layer)
    lorsa, path = module.dictionary, module.path
    if isinstance(lorsa, Lorsa):
        _require_head(head, lorsa.config.n_qk_heads, f"the Lorsa of layer {layer}")
        return Head.of_lorsa(module.x, lorsa, head, module.reads.bias)
    assert isinstance(path, OwnAttention)
    weights, geometry = path.reading.weights, path.reading.geometry
    _require_head(head, geometry.n_heads, f"layer {layer}")
    return Head.of_layer(path.x, weights, geometry, head, module.reads.bias)


def _attention(frozen: Frozen, layer: int) -> Module:
    """Return the attention of a layer; AnalyzeError if there is no such layer."""
    if not 0 <= layer < frozen.n_layers:
        raise AnalyzeError(f"layer is {layer}; the model has layers 0-{frozen.n_layers - 1}")
    return frozen.module(attention_depth(layer))


def _require_head(head: int, n_heads: int, of: str) -> None:
    if not 0 <= head < n_heads:
        raise AnalyzeError(f"QK head is {head}; {of} has QK heads 0-{n_heads - 1}")


class _Stream(NamedTuple):
    """The nodes of a run as a layer's attention reads them; a `Reader`."""

    sources: Sources
    module: Module

    def __call__(self, maps: Tensor, first: int) -> Iterator[Parts]:
        """Yield the nodes in pieces; see `Reader`."""
        reads, stop = self.module.reads, first + len(maps)
        gradient = reads.back(maps.transpose(1, 2)) * reads.scale[first:stop, None, None]
        below = torch.full((gradient.shape[1],), self.module.below)
        for made in swept(self.sources, gradient.contiguous(), first, below):
            yield made.nodes.long(), made.weights.T
