"""Parents of a Lorsa's heads: the heads of the original layer that they come from.

Three likenesses, each 0 to 1 (the second can be negative):

    ov       sqrt(a b): a the share of ||w_V||^2 in the space that the layer's head reads its values
             from, b the share of ||w_O||^2 in the space that it writes to
    qk       cosine of the bilinear forms W_Q W_K^T, without position
    pattern  sum_s min(P[t, s], P'[t, s]) of the two attention patterns, the mean over text
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...dictionaries.lorsa.contributions import BLOCK_ELEMENTS, patterns_of
from ...dictionaries.lorsa.module import Lorsa
from ...language.attention import LayerWeights, queries_keys
from ...language.geometry import AttentionGeometry
from ...language.latent import linear
from ...language.norms import in_chunks

N_PARENTS = 3
"""Parents of a head that are listed."""


class Parents(NamedTuple):
    """Likeliest heads of the layer for each OV head, the likeliest (by ov) first."""

    heads: Tensor
    """Heads of the layer, int64, [n_ov_heads, n]"""
    ov: Tensor
    """Likeness of values and outputs, [n_ov_heads, n]"""
    qk: Tensor
    """Likeness of queries and keys, [n_ov_heads, n]"""
    pattern: Tensor
    """Likeness of patterns, [n_ov_heads, n]"""


@torch.no_grad()
def find_parents(
    lorsa: Lorsa, weights: LayerWeights, geometry: AttentionGeometry, xs: Iterable[Tensor]
) -> Parents:
    """Return where the heads of a Lorsa come from.

    Args:
        lorsa: on the device of the rest.
        weights, geometry: of the original layer, in float32.
        xs: some of its inputs, [batch, seq, d_model] each.
    """
    c, xs = lorsa.config, list(xs)
    of_x = linear(weights, torch.cat(xs).float()) if xs else weights
    ov = ov_likeness(lorsa, of_x)
    n = min(N_PARENTS, ov.shape[1])
    best, heads = ov.topk(n, dim=1)
    qk_heads = (torch.arange(c.n_ov_heads) // (c.n_ov_heads // c.n_qk_heads)).to(heads.device)

    def of_parents(likeness: Tensor) -> Tensor:
        return likeness[qk_heads].gather(1, heads).cpu()

    qk = of_parents(qk_likeness(lorsa, of_x))
    pattern = of_parents(pattern_likeness(lorsa, weights, geometry, xs))
    return Parents(heads.cpu(), best.cpu(), qk, pattern)


def ov_likeness(lorsa: Lorsa, weights: LayerWeights) -> Tensor:
    """Return how far w_V and w_O lie in the spaces of the layer's heads, [n_ov_heads, n_heads]."""
    share = len(weights.W_O) // len(weights.W_V)
    read = _share_within(lorsa.W_V, weights.W_V).repeat_interleave(share, dim=1)
    written = _share_within(lorsa.W_O, weights.W_O.transpose(1, 2))
    return (read * written).sqrt()


def _share_within(vectors: Tensor, spaces: Tensor) -> Tensor:
    """Return the share of squared length in the columns' span: [n, d], [m, d, r] to [n, m]."""
    basis, _ = torch.linalg.qr(spaces)
    inside = torch.stack([(vectors @ one).square().sum(dim=1) for one in basis], dim=1)
    return inside / vectors.square().sum(dim=1, keepdim=True).clamp(min=1e-30)


def qk_likeness(lorsa: Lorsa, weights: LayerWeights) -> Tensor:
    """Return the cosine of W_Q W_K^T with that of the layer's heads, [n_qk_heads, n_heads]."""
    share = len(weights.W_Q) // len(weights.W_K)
    theirs = (weights.W_Q, weights.W_K.repeat_interleave(share, dim=0))
    ours = (lorsa.W_Q, lorsa.W_K)
    inner = torch.stack([_inner(ours, one, "ndr,ds->nrs") for one in zip(*theirs, strict=True)], 1)
    own, their = (_inner(pair, pair, "ndr,nds->nrs").clamp(min=1e-30) for pair in (ours, theirs))
    return inner / (own[:, None] * their[None, :]).sqrt()


def _inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], pairs: str) -> Tensor:
    """Return <A, B> of A = W_Q W_K^T, without making any of them, of the pairs of heads."""
    products = (torch.einsum(pairs, one, other) for one, other in zip(a, b, strict=True))
    return torch.mul(*products).sum(dim=(-2, -1))


def pattern_likeness(
    lorsa: Lorsa, weights: LayerWeights, geometry: AttentionGeometry, xs: Iterable[Tensor]
) -> Tensor:
    """Return the overlap of the patterns, the mean over queries, [n_qk_heads, n_heads]."""
    c, g = lorsa.config, geometry
    total = torch.zeros(c.n_qk_heads, g.n_heads, device=lorsa.W_V.device)
    n_queries = 0
    for x in (sequence for batch in xs for sequence in batch.float().split(1)):
        seq = x.shape[1]
        q, k = layer_queries_keys(x, weights, g)
        mine = lorsa.queries_keys(x)
        for rows in in_chunks(seq, max(c.n_qk_heads, g.n_heads) * seq, BLOCK_ELEMENTS):
            theirs = patterns_of(g, q, k, rows, weights.sinks)[0]  # [n_heads, rows, rows.stop]
            ours = patterns_of(c, *mine, rows, lorsa.sinks)[0]  # [n_qk_heads, rows, rows.stop]
            for head in range(len(theirs)):
                total[:, head] += torch.minimum(ours, theirs[head]).sum(dim=(1, 2))
        n_queries += seq
    return total / max(n_queries, 1)


def layer_queries_keys(
    x: Tensor, weights: LayerWeights, geometry: AttentionGeometry
) -> tuple[Tensor, Tensor]:
    """Return q and k of the layer's own heads, each [batch, seq, n_heads, d_head]."""
    q, k = queries_keys(x, weights, geometry)
    return q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
