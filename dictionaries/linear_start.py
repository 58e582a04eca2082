"""Start of an SAE or a transcoder: features for the directions that tokens really take.

What is read and what is written, each less its mean, half whitened and of one size, are clustered
side by side (spherical k-means; of an SAE they are the same). A cluster's centre, mapped back, has
a part d in x and a part e in y. A feature reads by the matched filter for d, writes e, and is
positive where it is more than MARGIN deviations from the mean:

    u   = Sigma^-1 d,  made so that u^T Sigma u = 1         Sigma the covariance of x
    W_E = u,  b_E = - u^T mean(x) - MARGIN
    W_O = e / (u^T d)

so that z is how much of d there is in x, and varies by 1. The first tenth of the features stand for
whole tokens. The others stand for what is left of each token when the best two of these are taken
off: so a token is a sum of features of different sizes from the start. One factor for all W_O fits
the sum to y by least squares. A skip connection starts as the linear map that explains most of y,
and features as what it leaves.

Starting in the active subspace keeps features alive: arXiv:2508.16929. Clusters, filter and two
stages are ours; docs/recipe.md has the figures.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .clusters import cluster
from .linear import LinearDictionary
from .sae import Sae
from .transcoder import Transcoder

EIGENVALUE_FLOOR = 1e-6
"""Directions with less variance than this share of the largest are left out."""
FIRST_SHARE = 0.1
"""Share of the features that stand for whole tokens."""
FIRST_TOP_K = 2
"""Features of these that are taken off a token before the rest is clustered."""
MARGIN = 1.0
"""What <u, x - mean(x)> has to exceed for a feature to be positive, in its deviations."""
ROUNDS = 2
"""Rounds of k-means; twice as many explain hardly more."""
POINTS_PER_FEATURE = 7
"""Tokens that are clustered, for each feature."""
FIT_TOKENS = 8192
"""Tokens of the sample that the scale of W_O, one number, is fitted on."""
RIDGE = 1e-3
"""Variance added to that of every direction in the fit of W_skip, as a share of the mean one."""
OUTLIER = 10.0
"""Norm of a token that is left out, in medians."""
CHUNK_TOKENS = 1024


class Axes(NamedTuple):
    """Mean and principal axes of some activations."""

    mean: Tensor
    """[d_model]"""
    axes: Tensor
    """Directions in which they vary, [d_model, rank]"""
    deviation: Tensor
    """Root of the variance along each, [rank]"""

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Return those of activations, [n, d_model]."""
        mean = values.double().mean(dim=0).to(values)
        centred = values - mean
        covariance = (centred.T @ centred).double() / len(values)
        variance, axes = torch.linalg.eigh(covariance)
        keep = variance > EIGENVALUE_FLOOR * variance[-1].clamp(min=1e-30)
        keep[-1] = True
        deviation = variance[keep].clamp(min=1e-30).sqrt()
        return cls(mean, axes[:, keep].to(values), deviation.to(values))

    def half_whitened(self, centred: Tensor) -> tuple[Tensor, float]:
        """Return activations less their mean in the half-whitened space, and their size there.

        Args:
            centred: [n, d_model].

        Returns:
            Points, [n, rank], of a mean square norm of 1, and the factor that made it so.
        """
        points = centred @ self.axes / self.deviation.sqrt()
        energy = float(points.double().square().sum(dim=1).mean())
        factor = energy**-0.5 if energy > 0 else 1.0
        return points * factor, factor

    def raw(self, points: Tensor, factor: float) -> Tensor:
        """Return the directions [n, d_model] of points of the half-whitened space."""
        return points / factor * self.deviation.sqrt() @ self.axes.T


@torch.no_grad()
def start_linear(
    dictionary: LinearDictionary,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
) -> None:
    """Fill an SAE or a transcoder from a sample; `fit_scale` does the rest.

    Tokens of outlier norm are left out. What is filled does not depend on which features fire.

    Args:
        dictionary: all of whose parameters but the thresholds are filled.
        x, y: a sample of what it reads and writes, [batch, seq, d_model]; the same for an SAE.
        seed: of the clustering.
    """
    generator = torch.Generator().manual_seed(seed)
    is_sae, n_features = isinstance(dictionary, Sae), dictionary.config.n_features
    x, y = _usual(x, x if is_sae else y)
    read = Axes.of(x)
    chosen = torch.randperm(len(x), generator=generator)[: POINTS_PER_FEATURE * n_features]
    chosen = chosen.to(x.device)
    x = x[chosen] - read.mean
    dictionary.b_O.copy_(y.mean(dim=0))
    y = y[chosen] - dictionary.b_O
    if isinstance(dictionary, Transcoder) and dictionary.W_skip is not None:
        y = y - _fit_skip(dictionary, x, y, read)
    dictionary.b_E.fill_(-MARGIN)
    first = round(FIRST_SHARE * n_features)
    left_x, left_y = x, x if is_sae else y
    for features in (slice(0, first), slice(first, n_features)):
        d = _fill(dictionary, features, left_x, None if is_sae else left_y, read, generator)
        if features.start == 0 and first > 0:
            left_x, left_y = _left(dictionary, features, x, y, d)
    if not is_sae:
        dictionary.b_E.sub_(dictionary.W_E @ read.mean)


@torch.no_grad()
def fit_scale(dictionary: LinearDictionary, x: Tensor, y: Tensor) -> None:
    """Scale W_O by least squares on some of the sample.

    Args:
        dictionary: with activation "topk"; see `Dictionary.as_topk`.
        x, y: see `start_linear`.
    """
    x, y = _usual(x, y)
    explained = energy = 0.0
    for t in range(0, min(len(x), FIT_TOKENS), CHUNK_TOKENS):
        some = x[None, t : t + CHUNK_TOKENS]
        y_hat = dictionary.summed(*dictionary.encode(some))[0].double()
        left = y[t : t + CHUNK_TOKENS] - dictionary.beside(some).view(-1, y.shape[1])
        explained += float((y_hat * left).sum())
        energy += float(y_hat.square().sum())
    if energy > 0 < explained:
        dictionary.W_O.mul_(explained / energy)


def _usual(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of x and y without those of outlier norm, [n, d_model] each."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    usual = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for norm in (x.norm(dim=1), y.norm(dim=1)):
        usual &= norm <= OUTLIER * norm.median()
    return x[usual], y[usual]


def _fit_skip(dictionary: Transcoder, x: Tensor, y: Tensor, read: Axes) -> Tensor:
    """Set W_skip by ridge regression of y on x, both less their means; return what it explains."""
    assert dictionary.W_skip is not None
    variance = read.deviation.square()
    inverse = read.axes / (variance + RIDGE * variance.mean())  # [d_model, rank]
    dictionary.W_skip.copy_((inverse @ (read.axes.T @ (x.T @ y) / len(x))).T)
    dictionary.b_O.sub_(dictionary.W_skip @ read.mean)
    return x @ dictionary.W_skip.T


def _fill(
    dictionary: LinearDictionary,
    features: slice,
    x: Tensor,
    y: Tensor | None,
    read: Axes,
    generator: torch.Generator,
) -> Tensor:
    """Fill W_E and W_O of some features from clusters.

    Args:
        dictionary: is filled.
        features: which.
        x, y: what they stand for, less their means, [n, d_model]; y is None of an SAE.
        read: axes of x.
        generator: of the clustering.

    Returns:
        What a unit of each feature takes off x, [features, d_model].
    """
    points, x_factor = read.half_whitened(x)
    n_features, rank = features.stop - features.start, points.shape[1]
    if y is not None:
        written = Axes.of(y)
        y_points, y_factor = written.half_whitened(y)
        points = torch.cat((points, y_points), dim=1)
    centres = cluster(points, n_features, generator, rounds=ROUNDS)
    d = read.raw(centres[:, :rank], x_factor)
    white = d @ read.axes / read.deviation
    size = white.norm(dim=1, keepdim=True).clamp(min=1e-30)  # u^T d
    dictionary.W_E[features] = (white / size / read.deviation) @ read.axes.T
    e = d if y is None else written.raw(centres[:, rank:], y_factor)
    dictionary.W_O[features] = e / size
    taken: Tensor = d / size
    return taken


def _left(
    dictionary: LinearDictionary, features: slice, x: Tensor, y: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x and y less what the best FIRST_TOP_K of some features explain, [n, d_model] each."""
    W_E, W_O, b_E = dictionary.W_E[features], dictionary.W_O[features], dictionary.b_E[features]
    norms = W_O.norm(dim=1)
    taken_x, taken_y = torch.empty_like(x), torch.empty_like(y)
    for t in range(0, len(x), CHUNK_TOKENS):
        rows = slice(t, t + CHUNK_TOKENS)
        z = x[rows] @ W_E.T + b_E
        ids = (z * norms).topk(min(FIRST_TOP_K, len(W_E)), dim=1).indices
        acts = torch.zeros_like(z).scatter_(1, ids, z.gather(1, ids).relu())
        taken_x[rows], taken_y[rows] = acts @ d, acts @ W_O
    return (
        x - taken_x * _least_squares(taken_x, x),
        y - taken_y * _least_squares(taken_y, y),
    )


def _least_squares(y_hat: Tensor, y: Tensor) -> float:
    """Return the factor that brings y_hat nearest to y."""
    energy = float(y_hat.double().square().sum())
    return float((y_hat.double() * y).sum()) / energy if energy > 0 else 0.0
