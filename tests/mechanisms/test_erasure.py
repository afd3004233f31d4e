"""Least-squares concept erasure."""

import pytest
import torch

from regularized.mechanisms.erasure import ConceptErasure


def correlated_rows(n: int = 400, d: int = 6) -> torch.Tensor:
    """Rows whose coordinates are correlated and of unequal size, where whitening matters."""
    return torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 3.0


def covariance(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    z = z.double().reshape(len(z), -1)
    return (x - x.mean(dim=0)).T @ (z - z.mean(dim=0)) / len(x)


@pytest.mark.parametrize("classes", [2, 3])
def test_nothing_linear_is_left(classes):
    """Fails when the projection misses part of the concept, or is made in coordinates that are not white."""
    torch.manual_seed(0)
    x = correlated_rows()
    labels = torch.randint(classes, (len(x),))
    x = x + 2.0 * torch.randn(classes, x.shape[1], dtype=torch.float64)[labels]
    z = torch.nn.functional.one_hot(labels)
    assert covariance(x, z).abs().max() > 0.1
    assert covariance(ConceptErasure(x, z)(x), z).abs().max() < 1e-10


def test_it_moves_the_rows_least():
    """Fails when the change is another erasing map than the smallest: the projection across the means' difference."""
    torch.manual_seed(1)
    x = correlated_rows()
    z = torch.randint(2, (len(x),))
    x = x + 2.0 * z[:, None] * torch.randn(x.shape[1], dtype=torch.float64)
    gap = torch.nn.functional.normalize(covariance(x, z)[:, 0], dim=0)
    projected = x - ((x - x.mean(dim=0)) @ gap)[:, None] * gap
    assert covariance(projected, z).abs().max() < 1e-10  # it erases as well
    moved = (ConceptErasure(x, z)(x) - x).square().sum(dim=1).mean()
    assert moved < 0.95 * (projected - x).square().sum(dim=1).mean()
    # Any other erasing map adds to it a map that the concept's covariance is blind to; none such makes it smaller.
    eraser = ConceptErasure(x, z)
    for _ in range(5):
        other = torch.randn(x.shape[1], x.shape[1], dtype=torch.float64)
        other = other - torch.outer(other @ gap, gap)
        perturbed = eraser(x) + 0.05 * (x - x.mean(dim=0)) @ other.T
        assert covariance(perturbed, z).abs().max() < 1e-10
        assert (perturbed - x).square().sum(dim=1).mean() > moved


def test_directions_without_variance():
    """Fails when the inverse of the covariance is taken where it has none: more numbers than rows, a constant one."""
    torch.manual_seed(2)
    x = torch.cat([torch.randn(20, 30), torch.ones(20, 1)], dim=1)
    z = torch.arange(20) % 2
    erased = ConceptErasure(x, z)(x)
    assert torch.isfinite(erased).all()
    assert covariance(erased.double(), z).abs().max() < 1e-5
    torch.testing.assert_close(erased[:, -1], x[:, -1])


def test_no_concept_no_change():
    """Fails when something is taken out although the concept says nothing: all rows have it, or none."""
    x = correlated_rows(50)
    assert torch.equal(ConceptErasure(x, torch.ones(50))(x), x)


def test_bad_input():
    """Fails when shapes that do not belong together, single rows or missing numbers pass."""
    with pytest.raises(ValueError, match="must be"):
        ConceptErasure(torch.randn(4, 3), torch.zeros(5))
    with pytest.raises(ValueError, match="two rows"):
        ConceptErasure(torch.randn(1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match="finite"):
        ConceptErasure(torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, 1]))
