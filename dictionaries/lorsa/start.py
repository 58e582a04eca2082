"""Initialisation of a Lorsa: from the layer that it replaces, or at random.

From the layer: QK head j is the layer's head p = j // (n_qk_heads / n_heads), as it is. Its OV
heads read and write the directions that head p really attends to, found by clustering a
half-whitened sample:

    o_p[t] = sum_s pattern_p[t, s] v_p[s]             what head p attends to, [d_head]
    Sigma  = cov(o_p) = U L U^T                        kept where o_p varies at all
    c_1 ... c_n = spherical k-means of L^-1/4 U^T (o_p - mean)     unit vectors
    g      = L^-1/4 c, made a unit vector              the same centre in the whitened space
    u      = U L^-1/2 g          W_V = u W_V^p,  b_V = u b_V^p - u mean(o_p)
    d      = U L^1/2 g           W_O = s d W_O^p

u^T d = 1 and u is parallel to Sigma^-1 d: z is how much of d there is in o_p, by a matched filter,
and varies by 1. One s for all heads is the least-squares scale on the sample, b_O the mean of y.

Starting from the layer's heads and in the active subspace keeps heads alive: He et al. 2025,
arXiv:2504.20938; arXiv:2508.16929. Clustering and filter are ours; docs/recipe.md has the
figures.

With a gate, o_p is what head p attends to times its gate, and the gate of an OV head is the mean of
its layer head's, weighted by |u d|: those of the channels that it reads and writes. z averages to 0
all the same: b_V = -u mean(o_p) / mean(gate).

With multi-head latent attention W_Q, W_K and W_V are those of x at the mean length of the latents
(`language/latent.py`), so patterns are near the layer's, not its own.

Weighted, head p becomes more QK heads the more it writes: in proportion to the deviation of
o_p W_O^p, one at least.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...language.attention import LayerWeights, gated, head_outputs
from ...language.geometry import RARE, AttentionGeometry
from ...language.latent import linear
from ..clusters import cluster
from .config import LorsaConfig
from .module import Lorsa

EIGENVALUE_FLOOR = 1e-6
"""Directions of o_p with less variance than this share of the largest are left out."""
NOISE_FLOOR = 1e-12
"""Directions with less than this share of ||mean||^2 are rounding, and left out as well."""
FIT_TOKENS = 8192
"""Tokens of the sample that the scale of W_O, one number, is fitted on."""


@torch.no_grad()
def init_random(lorsa: Lorsa, x: Tensor, *, seed: int) -> None:
    """Fill a Lorsa at random: projections of unit-variance outputs, W_O the transpose of W_V.

    `fit_output` does the rest.

    Args:
        x: a sample of the layer's input, [batch, seq, d_model].
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = float(x.square().mean()) ** -0.5 * lorsa.config.d_model**-0.5
    for weight in (lorsa.W_Q, lorsa.W_K, lorsa.W_V):
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    lorsa.W_O.copy_(lorsa.W_V)


@torch.no_grad()
def init_from_layer(
    lorsa: Lorsa,
    weights: LayerWeights,
    geometry: AttentionGeometry,
    x: Tensor,
    *,
    seed: int,
    weighted: bool = False,
) -> None:
    """Fill a Lorsa from the attention layer that it replaces; `fit_output` does the rest.

    Args:
        weights, geometry: the layer; weights on x's device and in its dtype.
        x: a sample of its input, [batch, seq, d_model].
        seed: of the clustering.
        weighted: whether heads that write more become more QK heads, instead of all equally many.

    Raises:
        ValueError: n_qk_heads is no multiple of the layer's heads, or d_qk_head is not its width.
    """
    c = lorsa.config
    require_fit(c, geometry)
    generator = torch.Generator().manual_seed(seed)
    kv_share = geometry.n_heads // geometry.n_kv_heads
    outputs = head_outputs(x, weights, geometry).flatten(0, 1)  # [tokens, n_heads, d_head]
    gates = _mean_gates(x, weights, geometry)  # [n_heads, d_head]
    weights = linear(weights, x)
    copies = torch.full((geometry.n_heads,), c.n_qk_heads // geometry.n_heads)
    by_place = c.alibi is not None or (c.qk_norm is not None and c.qk_norm.kind == "rms_full")
    if weighted and not by_place:
        copies = _weighted_copies(outputs, weights.W_O, c.n_qk_heads)
    _copy_attention(lorsa, weights, copies)
    ends = [0, *(copies.cumsum(0) * (c.n_ov_heads // c.n_qk_heads)).tolist()]
    for head in range(geometry.n_heads):
        mine = slice(ends[head], ends[head + 1])
        mean, read, write = _directions(outputs[:, head], mine.stop - mine.start, generator)
        lorsa.W_V[mine] = read @ weights.W_V[head // kv_share].T
        share = F.normalize((read * write).abs(), p=1, dim=1)  # [OV heads, d_head]
        lorsa.b_V[mine] = -(read @ mean)
        if gates is not None:
            lorsa.b_V[mine] /= share @ gates[head]
            _copy_gate(lorsa, weights, mine, share, head)
        if weights.b_V is not None:
            lorsa.b_V[mine] += read @ weights.b_V[head // kv_share]
        lorsa.W_O[mine] = write @ weights.W_O[head]


def scored_as(geometry: AttentionGeometry, n_qk_heads: int) -> dict[str, Any]:
    """Return the settings of a LorsaConfig by which so many heads attend as a layer's."""
    names = ("scale", "rope", "qk_norm", "softcap", "window", *RARE)
    settings = {name: getattr(geometry, name) for name in names}
    if geometry.alibi is not None:
        settings["alibi"] = geometry.alibi.of_heads(n_qk_heads)
    return settings


def require_fit(config: LorsaConfig, geometry: AttentionGeometry) -> None:
    """Raise ValueError unless a Lorsa of this shape can start from a layer of this geometry."""
    if config.n_qk_heads % geometry.n_heads:
        raise ValueError(
            f"n_qk_heads is {config.n_qk_heads}; init 'layer' needs a multiple of the layer's "
            f"{geometry.n_heads} heads, or use init 'random'"
        )
    if config.d_qk_head != geometry.d_head:
        raise ValueError(
            f"d_qk_head is {config.d_qk_head}; init 'layer' needs the layer's {geometry.d_head}, "
            "or use init 'random'"
        )


def _weighted_copies(outputs: Tensor, W_O: Tensor, n_qk_heads: int) -> Tensor:
    """Return how many QK heads each head becomes, by largest remainder, [n_heads].

    Args:
        outputs: what the heads attend to, [tokens, n_heads, d_head].
        W_O: [n_heads, d_head, d_model].
        n_qk_heads: their sum.
    """
    n_free = n_qk_heads - outputs.shape[1]
    centred = (outputs - outputs.mean(dim=0)).transpose(0, 1)  # [n_heads, tokens, d_head]
    covariance = (centred.transpose(1, 2) @ centred).double() / outputs.shape[0]
    energy = (covariance @ W_O.double() * W_O.double()).sum(dim=(1, 2))
    deviation = energy.clamp(min=0).sqrt().cpu()
    if not deviation.any():
        deviation = torch.ones_like(deviation)
    above = (deviation / deviation.sum() * n_qk_heads - 1).clamp(min=0)  # one is had already
    above = above / above.sum().clamp(min=1e-30) * n_free
    copies = above.long()
    n_left = n_free - int(copies.sum())
    copies[(above - copies).argsort(descending=True, stable=True)[:n_left]] += 1
    return copies + 1


def _mean_gates(x: Tensor, weights: LayerWeights, geometry: AttentionGeometry) -> Tensor | None:
    """Return the mean of a layer's gates over a sample x, [n_heads, d_head]; None without any."""
    if weights.W_G is None:
        return None
    ones = torch.ones(*weights.W_O.shape[:2], device=x.device)
    sums = [gated(rows[None], ones, weights, geometry).sum(dim=(0, 1)) for rows in x]
    return torch.stack(sums).sum(dim=0) / (x.shape[0] * x.shape[1])


def _copy_gate(lorsa: Lorsa, weights: LayerWeights, mine: slice, share: Tensor, head: int) -> None:
    """Set the gates of a layer head's OV heads to means over its channels by share."""
    assert weights.W_G is not None
    assert lorsa.W_G is not None
    assert lorsa.b_G is not None
    lorsa.W_G[mine] = share @ weights.W_G[head].T.expand(share.shape[1], -1)
    if weights.b_G is not None:
        lorsa.b_G[mine] = share @ weights.b_G[head].expand(share.shape[1])


def _copy_attention(lorsa: Lorsa, weights: LayerWeights, copies: Tensor) -> None:
    head = torch.arange(len(copies)).repeat_interleave(copies).to(weights.W_Q.device)
    if lorsa.sinks is not None and weights.sinks is not None:
        lorsa.sinks.copy_(weights.sinks[head])
    of_side = {"q": head, "k": head // (len(copies) // len(weights.W_K))}
    for side, source in of_side.items():
        for name in (f"W_{side.upper()}", f"b_{side.upper()}", f"{side}_norm", f"{side}_norm_bias"):
            ours, theirs = getattr(lorsa, name), getattr(weights, name)
            if ours is not None and theirs is not None:
                for_all = "norm" in name and ours.ndim == 1  # one factor for all heads
                ours.copy_(theirs if for_all else theirs[source])


def _directions(
    outputs: Tensor, n_directions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what n_directions OV heads read and write of one head's outputs, [tokens, d_head].

    Returns:
        Mean of the outputs, [d_head]; directions u and directions d, [n_directions, d_head] each.
    """
    wide = outputs.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(wide))
    keep = variance > EIGENVALUE_FLOOR * variance[-1] + NOISE_FLOOR * mean.square().sum()
    mean, axes = mean.to(outputs), axes[:, keep].to(outputs)  # [d_head], [d_head, rank]
    deviation = variance[keep].sqrt().to(outputs)  # [rank]
    half = deviation.sqrt()
    centres = cluster((outputs - mean) @ axes / half, n_directions, generator)
    g = F.normalize(centres / half, dim=1)  # [n_directions, rank]
    return mean, (g / deviation) @ axes.T, (g * deviation) @ axes.T


@torch.no_grad()
def fit_output(lorsa: Lorsa, x: Tensor, y: Tensor) -> None:
    """Set b_O to the mean of y and scale W_O by least squares on some of the sample.

    Args:
        x, y: a sample of the layer's input and output, [batch, seq, d_model].
    """
    lorsa.b_O.copy_(y.mean(dim=(0, 1)))
    explained = energy = 0.0
    for b in range(min(len(x), -(-FIT_TOKENS // x.shape[1]))):
        y_hat = (lorsa(x[b : b + 1]) - lorsa.b_O).double()
        explained += float((y_hat * (y[b] - lorsa.b_O)).sum())
        energy += float(y_hat.square().sum())
    if energy > 0:
        lorsa.W_O.mul_(explained / energy)
