"""Chance: what random directions, common tokens and other heads do without any reason."""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

N_RANDOM = 1024
"""Random directions, drawn by a seed, that the lists of heads are compared with."""
N_SPREAD = 256
"""Those of them that what is done to a token by chance is measured with."""
N_BEST = 3
"""Tokens of a list, those with the largest z, that its own z goes by."""
N_OTHERS = 256
"""Heads of the layer, drawn by a seed, that likeness is compared with at most."""
FEWEST_OTHERS = 32
"""Heads below which a layer says nothing of what its heads do anyway."""
FEWEST_EXAMPLES = 4
"""Examples of a head below which what they read says nothing."""
MEDIAN = 0.6745
"""Median of |g| of a normal variable g of variance 1."""

Products = Callable[[Tensor], Tensor]
"""Linear, from vectors [n, d] to their products with targets, [n, n_targets]"""


def unit(vectors: Tensor) -> Tensor:
    """Return rows of length 1, [n, d]; rows of zeros stay so."""
    return torch.nn.functional.normalize(vectors.detach().float(), dim=1)


class RandomLists(NamedTuple):
    """What random directions do to targets, and how the lists of those that they do most look."""

    spread: Tensor
    """Standard deviation of the product of a target with a direction of length 1, [n_targets]"""
    best: Tensor
    """Mean z of the best targets in each list, ascending, float64, [N_RANDOM]"""

    @classmethod
    def draw(cls, products: Products, directions: Tensor, n_listed: int, chunk: int) -> Self:
        """Draw directions and list the targets of each.

        They are mixtures of all heads' directions by normal weights, and so have their covariance:
        a layer leans to some directions, as that from rare to common tokens, which say nothing of
        one head. Of few heads they are even in all directions.

        Args:
            products: of the targets, their mean taken off.
            directions: of all heads, of length 1, [n_heads, d].
            n_listed: targets in a list.
            chunk: directions that are multiplied at once.
        """
        n_heads, d = directions.shape
        few = n_heads < FEWEST_OTHERS
        seeded = torch.Generator().manual_seed(0)
        drawn = torch.randn(N_RANDOM, d if few else n_heads, generator=seeded).to(directions)
        drawn = unit(drawn if few else drawn @ directions)
        some = drawn[:N_SPREAD].split(chunk)
        squares = torch.stack([products(each).square().sum(dim=0) for each in some]).sum(dim=0)
        spread = (squares / N_SPREAD).sqrt().clamp(min=1e-30)
        best: list[Tensor] = []
        for each in drawn.split(chunk):
            values, ids = products(each).topk(n_listed, dim=1)
            best.append(_best(values / spread[ids]))
        return cls(spread, torch.cat(best).double().sort().values)

    def score(self, values: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the z of each target in a list, and that of the list.

        Args:
            values: products of vectors with the targets that are listed of them, [n, n_listed].
            ids: of the targets, [n, n_listed].
            lengths: of the vectors, [n, 1].

        Returns:
            [n, n_listed] and [n]
        """
        z = values / (self.spread[ids] * lengths.clamp(min=1e-30))
        return z, self._list_z(_best(z).double()).float()

    def _list_z(self, found: Tensor) -> Tensor:
        """Return the z at which a normal variable is as rare as lists like these, [n].

        Beyond the largest twentieth of the random lists, chances are taken to fall exponentially.
        """
        n = len(self.best)
        tail = self.best[-(n // 20) :]
        excess = (tail - tail[0]).mean().clamp(min=1e-30)
        above = n - torch.searchsorted(self.best, found) + 1
        chance = len(tail) / n * torch.exp(-(found - tail[0]) / excess)
        chance = torch.where(found > tail[0], chance, above / (n + 1))
        z: Tensor = -torch.special.ndtri(chance.clamp(min=1e-300))
        return z


def _best(z: Tensor) -> Tensor:
    """Return the mean of the largest z of each row, [n]."""
    return z.topk(min(N_BEST, z.shape[1]), dim=1).values.mean(dim=1)


def likeness_by_chance(directions: Tensor, chunk: int) -> Tensor:
    """Return how far the cosine of each head with another goes by chance, a standard deviation.

    It is the larger of two: that of random directions, 1 / sqrt(d), and that of other heads, by
    their median, which a family of near-copies moves little.

    Args:
        directions: of all heads, of length 1, [n_heads, d].
        chunk: heads that are multiplied at once.

    Returns:
        [n_heads]
    """
    n_heads, d = directions.shape
    even = torch.full((n_heads,), d**-0.5, device=directions.device)
    if n_heads < FEWEST_OTHERS:
        return even
    seeded = torch.Generator().manual_seed(0)
    others = directions[torch.randperm(n_heads, generator=seeded)[:N_OTHERS].to(directions.device)]
    medians = [(some @ others.T).abs().median(dim=1).values for some in directions.split(chunk)]
    return torch.maximum(even, torch.cat(medians) / MEDIAN)


def share_scores(
    shares: NDArray[np.float64], rates: NDArray[np.float64], n: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the z of mean shares of n independent examples, where rates are expected.

    The mean of n values in 0..1 of mean p is s or more with a chance of at most exp(-n D), D the
    divergence of a coin of s from one of p (Hoeffding 1963); z = sqrt(2 n D). It is 0 where s <= p,
    and of fewer than FEWEST_EXAMPLES.

    Args:
        shares: s, [k].
        rates: p, [k].
        n: examples, [k].
    """
    s, p = np.clip(shares, 0, 1), np.clip(rates, 1e-12, 1 - 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        for_it = np.where(s > 0, s * np.log(s / p), 0)
        against = np.where(s < 1, (1 - s) * np.log((1 - s) / (1 - p)), 0)
    divergence = np.maximum(for_it + against, 0)
    return np.where((s > p) & (n >= FEWEST_EXAMPLES), np.sqrt(2 * n * divergence), 0.0)
