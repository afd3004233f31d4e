"""Conjugate gradients: exact in n steps, warm starts, tuples, and what is no positive definite operator."""

import pytest
import torch

from regularized.mechanisms.conjugate_gradient import NotPositiveDefinite, conjugate_gradient


def system(n: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return factor @ factor.T + torch.eye(n, dtype=torch.float64), torch.randn(n, generator=generator).double()


def test_direct_solve():
    """Fails with a wrong sign or a stale direction: the answer is that of LU, within n iterations."""
    A, b = system()
    result = conjugate_gradient(lambda v: A @ v, b, tol=1e-10)
    torch.testing.assert_close(result.solution, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    assert result.iterations <= 14
    assert result.converged
    assert result.residual_norm == pytest.approx(float((b - A @ result.solution).norm()), abs=1e-10)


@pytest.mark.parametrize("every", [1, 5])
def test_residual_is_below_the_tolerance(every):
    """Fails when the loop stops a step early, or goes on past the tolerance with looks at every fifth residual."""
    A, b = system(30)
    for tol in (1.0, 1e-2, 1e-5):
        result = conjugate_gradient(lambda v: A @ v, b, tol=tol, check_every=every)
        assert float((b - A @ result.solution).norm()) <= tol * (1 + 1e-6)
    exact = conjugate_gradient(lambda v: 2.0 * v, b, tol=1e-3, check_every=every)
    torch.testing.assert_close(exact.solution, b / 2.0)  # converged in one: 0 / 0 later would give nan


def test_small_right_hand_side_is_zero():
    """Fails when the start is returned where ||b|| <= tol, as the paper's code does."""
    A, b = system()
    result = conjugate_gradient(lambda v: A @ v, 1e-6 * b, tol=1.0, x0=b)
    assert not result.solution.any()
    assert result.iterations == 0


def test_warm_start():
    """Fails when the warm start is not used, or its residual's product not counted."""
    A, b = system()
    exact = torch.linalg.solve(A, b)
    result = conjugate_gradient(lambda v: A @ v, b, tol=1e-8, x0=exact)
    assert result.iterations == 1
    assert torch.equal(result.solution, exact)


def test_tuples_equal_one_vector():
    """Fails when parts of a tuple are mixed up, or each part gets a step of its own."""
    A, b = system()

    def product(parts):
        return (A @ torch.cat([parts[0].reshape(-1), parts[1]])).split([4, 8])

    whole = conjugate_gradient(lambda v: A @ v, b, tol=1e-6)
    parts = conjugate_gradient(lambda v: (product(v)[0].view(2, 2), product(v)[1]), (b[:4].view(2, 2), b[4:]), tol=1e-6)
    assert parts.iterations == whole.iterations
    assert torch.equal(torch.cat([parts.solution[0].reshape(-1), parts.solution[1]]), whole.solution)


def test_says_when_iterations_do_not_suffice():
    """Fails when an unfinished solve looks like a finished one."""
    A, b = system(40)
    result = conjugate_gradient(lambda v: A @ v, b, tol=1e-12, max_iterations=3)
    assert (result.converged, result.iterations) == (False, 3)
    assert result.residual_norm > 1e-12


@pytest.mark.parametrize("every", [1, 7])
def test_negative_curvature(every):
    """Fails when an indefinite operator gives an answer, silently wrong."""
    A, b = system()
    with pytest.raises(NotPositiveDefinite, match=r"p\^T A p = -.*ridge"):
        conjugate_gradient(lambda v: A @ v - 30.0 * v, b, tol=1e-6, check_every=every)
    with pytest.raises(NotPositiveDefinite):
        conjugate_gradient(torch.zeros_like, b, tol=1e-6)


def test_errors():
    """Fails when nan goes round and round, or a negative tolerance is taken."""
    A, b = system()
    with pytest.raises(ValueError, match="right-hand side is not finite"):
        conjugate_gradient(lambda v: A @ v, b * float("nan"), tol=1e-6)
    with pytest.raises(ValueError, match="product with the operator is not finite"):
        conjugate_gradient(lambda v: float("nan") * v, b, tol=1e-6)
    with pytest.raises(ValueError, match="tol must be"):
        conjugate_gradient(lambda v: A @ v, b, tol=-1.0)
