"""Neighbours by brute force, and which outliers are kept."""

import pytest
import torch

from regularized.continual.ovor import (
    OutlierSampler,
    boundary_outliers,
    boundary_points,
    kth_squared_distance,
    neighbours,
    official_outliers,
)
from regularized.continual.ovor.neighbours import lonely_sums, unit


def cloud(rows=40, dim=6, seed=0):
    return 2.0 * torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(queries, points, k):
    return torch.cdist(queries, points).square().sort(dim=1).values[:, k - 1]


@pytest.mark.parametrize("k", [1, 3, 40])
def test_kth_distance_by_brute_force(k, monkeypatch):
    """Fails on the neighbour before or after, on a plain for a squared distance, and on parts in a wrong order."""
    monkeypatch.setattr(neighbours, "_NUMBERS", 7 * 40)  # seven queries at once
    points, queries = unit(cloud()), cloud(seed=1)
    torch.testing.assert_close(kth_squared_distance(queries, points, k), brute(queries, points, k))


def test_a_point_is_its_own_nearest():
    """Fails when the point itself is left out, which the paper's K counts."""
    points = unit(cloud().float())
    assert kth_squared_distance(points, points, 1).max().item() < 1e-6
    torch.testing.assert_close(kth_squared_distance(points, points, 2), brute(points, points, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_sums_are_searched_as_their_parts(normalise, monkeypatch):
    """Fails when a cross term of |h + e|^2 is lost, or noises of one part stand under another's base."""
    monkeypatch.setattr(neighbours, "_NUMBERS", 4 * 40)
    points, bases, noises = unit(cloud()), cloud(5, seed=1), cloud(9, seed=2)
    sums = (bases[:, None] + noises).flatten(0, 1)
    expected = brute(unit(sums) if normalise else sums, points, 4).view(5, 9)
    torch.testing.assert_close(lonely_sums(bases, noises, points, 4, normalise=normalise), expected)


def test_boundary_points_are_the_loneliest():
    """Fails on the smallest distances, and on features of which the longest is taken for the loneliest."""
    crowd = torch.tensor([1.0, 0.0]) + 0.01 * cloud(20, 2)
    features = torch.cat([50.0 * crowd, torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)])
    assert sorted(boundary_points(features, k=3, select=2).tolist()) == [20, 21]


@pytest.mark.parametrize("normalise", [True, False])
def test_outliers_are_the_loneliest_candidates(normalise):
    """Fails when candidates lie around the origin, are returned at length 1, or are ordered the other way."""
    features, noises = cloud(), 0.3 * cloud(11, seed=1)
    boundary = boundary_points(features, k=4, select=5)
    candidates = (features[boundary][:, None] + noises).flatten(0, 1)
    distances = brute(unit(candidates) if normalise else candidates, unit(features), 4)
    expected = candidates[distances.topk(13).indices]
    found = boundary_outliers(features, boundary, noises, k=4, keep=13, normalise=normalise)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("keep", "distinct"), [(12, 2), (8, 1), (9, 2), (10_000, 11)])
def test_official_outliers_are_copies_of_few(keep, distinct):
    """What a search of all repeated candidates gives. Fails when each noise is kept once, or around a feature."""
    features, noises = cloud(), 0.3 * cloud(11, seed=1)
    found = official_outliers(features, noises, k=4, select=8, keep=keep)
    repeated = noises.repeat(8, 1)
    wanted = repeated[brute(repeated, unit(features), 4).topk(min(keep, 88)).indices]
    torch.testing.assert_close(found, wanted)
    assert len(found.unique(dim=0)) == distinct


def test_around_the_boundary_all_outliers_differ():
    """Fails when the same noises make the same outliers at each boundary point."""
    sampler = OutlierSampler(k=4, select=6, noises=10, per_class=7)
    drawn = sampler.draw(cloud().float(), num_classes=3, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (21, 6)
    assert len(drawn.unique(dim=0)) == 21


@pytest.mark.parametrize("around", ["boundary", "origin"])
def test_draws_follow_the_generator_and_the_dtype(around):
    """Fails when noise comes from the global generator, or features of half precision are returned as float32."""
    sampler = OutlierSampler(around=around, k=4, select=6, noises=10, per_class=7)
    features = cloud().to(torch.bfloat16)
    one, again = (sampler.draw(features, num_classes=2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again)
    assert one.dtype == torch.bfloat16


def test_fewer_features_than_boundary_points():
    """Fails when a small task asks for more boundary points than it has."""
    sampler = OutlierSampler(k=3, select=50, noises=4, per_class=500)
    assert sampler.draw(cloud(7), num_classes=2).shape == (28, 6)


def test_sigma_is_a_standard_deviation():
    """Fails when sigma is taken for a variance."""
    sampler = OutlierSampler(around="origin", sigma=0.1, k=2, select=1, noises=2000, per_class=2000)
    drawn = sampler.draw(cloud(10, 8).float(), num_classes=1, generator=torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(0.1, rel=0.05)
