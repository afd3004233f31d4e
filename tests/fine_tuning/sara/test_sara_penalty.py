"""The gradient of the nuclear norm."""

import pytest
import torch

from regularized.fine_tuning.sara.penalty import nuclear_norm, polar_factor

METHODS = ["svd", "newton_schulz"]


@pytest.mark.parametrize("method", METHODS)
def test_diagonal_gives_signs(method):
    """Fails for singular values in place of ones, or absolute values of the diagonal."""
    d = torch.tensor([3.0, -0.5, 1e-2, -7.0], dtype=torch.float64)
    torch.testing.assert_close(polar_factor(d.diag(), method=method), d.sign().diag(), rtol=0, atol=1e-6)


def test_rank_one_gives_the_unit_vectors():
    """The other singular values are zero: U V^T of all of them would be an arbitrary rotation."""
    u, v = (torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 8))
    expected = torch.outer(u / u.norm(), v / v.norm())
    torch.testing.assert_close(polar_factor(torch.outer(u, v)), expected)
    torch.testing.assert_close(polar_factor(torch.outer(u, v), method="newton_schulz"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(66, 70), (70, 66), (80, 300)])
def test_inner_product_is_the_norm(shape, method):
    """Fails if the iteration does not converge, or a tall matrix comes back transposed. Sparse, as in training."""
    draws = torch.Generator().manual_seed(0)
    a = 0.01 * torch.randn(shape, generator=draws) * (torch.rand(shape, generator=draws) < 0.1)
    polar = polar_factor(a, method=method)
    assert polar.shape == shape
    assert float((a * polar).sum()) == pytest.approx(float(nuclear_norm(a)), rel=1e-5)
    assert float(torch.linalg.matrix_norm(polar, 2)) <= 1 + 1e-4  # in the unit ball of the dual norm: a subgradient


@pytest.mark.parametrize("method", METHODS)
def test_zeros(method):
    """Fails for a division by zero: what nobody has trained yet has no change to penalise."""
    assert not polar_factor(torch.zeros(4, 6), method=method).any()


def test_unknown_method():
    with pytest.raises(ValueError, match="'svd' or 'newton_schulz', got 'qr'"):
        polar_factor(torch.ones(2, 2), method="qr")


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("at", [(0, 0), (1, 2), (2, 3)])
def test_an_infinite_entry_stays_seen(method, at):
    """Fails when comparisons with nan are taken for zero singular values: a zero row would pass for a gradient."""
    for matrix in (torch.eye(3, 4), torch.arange(12.0).reshape(3, 4)):
        matrix[at] = float("inf")
        assert not polar_factor(matrix, method=method).isfinite().all()
        assert not (polar_factor(matrix, method=method) == 0).all(dim=1).any()
