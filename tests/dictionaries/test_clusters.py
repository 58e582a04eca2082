"""Spherical k-means: centres are unit vectors that points lie near to."""

import torch
import torch.nn.functional as F
from lorsa.dictionaries.clusters import cluster, nearest, sums_of


def test_clusters_are_unit_vectors_and_find_the_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.eye(6)[:4]
    points = truth.repeat(50, 1) * torch.rand(200, 1, generator=generator)
    points = points + 0.05 * torch.randn(points.shape, generator=generator)
    centres = cluster(points, 12, generator)
    assert torch.allclose(centres.norm(dim=1), torch.ones(12))
    assert (centres @ truth.T).max(dim=0).values.min() > 0.97


def test_clustering_brings_points_nearer_to_their_centres() -> None:
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))

    def nearness(rounds: int) -> float:
        centres = cluster(points, 20, torch.Generator().manual_seed(1), rounds=rounds)
        return float((F.normalize(points, dim=1) @ centres.T).amax(dim=1).mean())

    assert nearness(8) > nearness(0) + 0.03


def test_clusters_of_too_few_points_are_filled_up() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = cluster(torch.randn(3, 5, generator=generator), 8, generator)
    assert centres.shape == (8, 5)
    assert torch.allclose(centres.norm(dim=1), torch.ones(8))
    assert len({tuple(row) for row in centres.tolist()}) == 8


def test_sums_are_by_cluster() -> None:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    of = nearest(points, torch.eye(4))
    assert torch.equal(of, points.argmax(dim=1))
    total, count = sums_of(of, points, 6)
    for i in range(6):
        assert int(count[i]) == int((of == i).sum())
        torch.testing.assert_close(total[i], points[of == i].sum(dim=0))
