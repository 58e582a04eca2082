"""Directions that stand for many points: spherical k-means."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26
"""Likenesses of points to centres that are in memory at once, 256 MB in float32."""


def cluster(
    points: Tensor, n_clusters: int, generator: torch.Generator, *, rounds: int = 8
) -> Tensor:
    """Return the centres of a spherical k-means, unit vectors, [n_clusters, rank].

    It starts from random points; where these are too few, random directions stay as they are.

    Args:
        points: [n_points, rank].
        n_clusters: how many centres.
        generator: of the start, on the CPU.
        rounds: times that the centres move to the mean of their points.
    """
    n_points, rank = points.shape
    unit = F.normalize(points, dim=1)
    chosen = torch.randperm(n_points, generator=generator)[:n_clusters].to(unit.device)
    extra = torch.randn(n_clusters - len(chosen), rank, generator=generator).to(unit)
    centres = F.normalize(torch.cat((unit[chosen], extra)), dim=1)
    for _ in range(rounds):
        total, count = sums_of(nearest(unit, centres), unit, n_clusters)
        centres = torch.where(count[:, None] > 0, F.normalize(total, dim=1), centres)
    return centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return the centre with the largest dot product with each point, [n_points].

    Args:
        points: [n_points, rank].
        centres: [n_clusters, rank].
    """
    step = max(1, CHUNK_ELEMENTS // len(centres))
    return torch.cat([(some @ centres.T).argmax(dim=1) for some in points.split(step)])


def sums_of(of: Tensor, values: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the values of each cluster, and how many there are.

    Args:
        of: cluster of each row, [n_points].
        values: [n_points, width].
        n_clusters: how many clusters.

    Returns:
        Sums, [n_clusters, width], in a fixed order; counts, [n_clusters].
    """
    narrow = torch.int16 if n_clusters < 1 << 15 else torch.int32  # sorts in half the time
    count = of.bincount(minlength=n_clusters)
    by_cluster = of.to(narrow).argsort(stable=True)
    return F.embedding_bag(by_cluster, values, count.cumsum(0) - count, mode="sum"), count
