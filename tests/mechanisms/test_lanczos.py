"""The ends of a spectrum from products alone. Each test names the fault that makes it fail."""

import pytest
import torch

from regularized.mechanisms.lanczos import extreme_eigenvalues


def random_vector(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_all_directions_give_the_exact_ends(n):
    """With as many steps as dimensions it is exact: fails for a wrong entry of the tridiagonal matrix."""
    a = symmetric(n)
    expected = torch.linalg.eigvalsh(a)
    low, high = extreme_eigenvalues(lambda v: a @ v, random_vector(n), steps=n, tol=0.0)
    assert low == pytest.approx(float(expected[0]), abs=1e-10)
    assert high == pytest.approx(float(expected[-1]), abs=1e-10)


def test_few_steps_bound_from_inside():
    """Ritz values lie inside the spectrum, and come closer with more steps: fails if products are taken wrongly."""
    a = symmetric(200)
    expected = torch.linalg.eigvalsh(a)
    ends = [extreme_eigenvalues(lambda v: a @ v, random_vector(200), steps=k, tol=0.0) for k in (3, 10, 40)]
    for low, high in ends:
        assert float(expected[0]) - 1e-9 <= low
        assert high <= float(expected[-1]) + 1e-9
    assert ends[0][0] > ends[1][0] > ends[2][0]
    assert ends[0][1] < ends[1][1] < ends[2][1]
    assert ends[2][1] == pytest.approx(float(expected[-1]), rel=1e-2)


def test_orthogonality_survives_rounding():
    """Over 1e10 of range: without the second orthogonalisation eigenvalues come back, and the small one is lost."""
    values = torch.logspace(-6, 4, 60, dtype=torch.float64)
    low, high = extreme_eigenvalues(lambda v: values * v, random_vector(60), steps=60, tol=0.0)
    assert high == pytest.approx(1e4)
    assert low == pytest.approx(1e-6, rel=1e-3)


def test_stops_when_known():
    """Three different eigenvalues need three products: fails if it goes on, dividing by a vanished residual."""
    products = []
    values = torch.tensor([2.0] * 50 + [3.0] * 49 + [-1.0], dtype=torch.float64)

    def matvec(v):
        products.append(v)
        return values * v

    low, high = extreme_eigenvalues(matvec, random_vector(100))
    assert (low, high) == (pytest.approx(-1.0), pytest.approx(3.0))
    assert len(products) <= 4


def test_bad_input():
    """Fails if nan comes out instead of an error."""
    with pytest.raises(ValueError, match="start must be finite and not zero"):
        extreme_eigenvalues(lambda v: v, torch.zeros(3))
    with pytest.raises(ValueError, match="product with the operator is not finite"):
        extreme_eigenvalues(lambda v: v / 0.0, torch.ones(3))
