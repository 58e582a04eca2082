"""Types of a layer's own attention heads, of what they read in stored text.

A head reads ||P v||, where a head of a Lorsa, whose value is a number, reads |P v|.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...dictionaries.lorsa.contributions import BLOCK_ELEMENTS, patterns_of
from ...errors import AnalyzeError
from ...language.attention import LayerWeights, values
from ...language.geometry import AttentionGeometry
from ...language.norms import in_chunks
from ...language.stored import site_reader
from ...sites import Site
from ...store.read.reader import ActivationStore
from .bounds import Sums, lower_bounds
from .kinds import N_KINDS, kinds
from .parents import layer_queries_keys


class OwnTypes(NamedTuple):
    """What heads of a layer read, each [n_heads, kinds], in the order of STORE_SCORES."""

    shares: Tensor
    """Share of its reading that is of a kind; NaN where no token offers such a source"""
    bounds: Tensor
    """Lower bounds of the shares; NaN where too little was seen"""


@torch.no_grad()
def own_types(store: ActivationStore, layer: int, seqs: Sequence[int], device: str) -> OwnTypes:
    """Return what the heads of a stored layer read.

    Args:
        store: with the layer's inputs and weights.
        layer: which.
        seqs: sequences of the store to read.
        device: where to compute.

    Raises:
        AnalyzeError: the store does not know the layer's attention.
    """
    module = f"{layer}.attention"
    facts, weights = store.manifest.modules[module].get("geometry"), store.weights(module)
    if not facts or "W_Q" not in weights:
        raise AnalyzeError(f"layer {layer}: its attention is not known, so there are no patterns")
    own = LayerWeights(**weights).to(device, torch.float32)
    g = AttentionGeometry.from_dict(facts)
    x = site_reader(store, Site(layer, "attn_in"), device)
    read = [
        _read(
            x([number]),
            store.tokens([number]).long().to(device),
            own,
            g,
        )
        for number in seqs
    ]
    c, o = (torch.stack(each) for each in zip(*read, strict=True))  # [n_seqs, n_heads, kinds]
    sums = Sums.of(c, o)
    return OwnTypes(sums.c / sums.o, lower_bounds(sums))


def _read(x: Tensor, ids: Tensor, own: LayerWeights, g: AttentionGeometry) -> tuple[Tensor, Tensor]:
    """Return what heads read of each kind in a sequence, and where it is offered, float64.

    Args:
        x: the layer's input, [1, seq, d_model].
        ids: its tokens, [1, seq].
        own: weights of the layer.
        g: its geometry.
    """
    lengths = values(x, own, g).norm(dim=-1).transpose(1, 2)  # [1, n_kv_heads, seq]
    lengths = lengths.repeat_interleave(g.n_heads // g.n_kv_heads, dim=1)
    q, k = layer_queries_keys(x, own, g)
    seq = x.shape[1]
    by_kind = torch.zeros(g.n_heads, N_KINDS, dtype=torch.float64, device=x.device)
    offered = torch.zeros_like(by_kind)
    for rows in in_chunks(seq, max(g.n_heads, N_KINDS) * seq, BLOCK_ELEMENTS):
        length = lengths[0, :, None, : rows.stop]
        read = patterns_of(g, q, k, rows, own.sinks)[0] * length  # [n_heads, t, s]
        kind = kinds(ids[:, : rows.stop], rows, g.window)[0].float()  # [t, s, kinds]
        by_kind += torch.einsum("hts,tsk->hk", read, kind).double()
        offered += torch.einsum("hts,tk->hk", read, kind.amax(dim=1)).double()
    return by_kind.cpu(), offered.cpu()
