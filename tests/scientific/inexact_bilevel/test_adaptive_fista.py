"""An inner solver that need not be told L. Each test names the fault that makes it fail."""

import pytest
import torch

from regularized.scientific.inexact_bilevel.adaptive_fista import AdaptiveFista
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached, fista, solve_lower

SCALE = torch.logspace(-2, 1, 40, dtype=torch.float64)


def gradient(x):
    return SCALE * x - 1.0


def solve(solver, *, eps=1e-6, L=10.0, max_iterations=5000):
    return solver(gradient, torch.zeros(40, dtype=torch.float64), mu=1e-2, L=L, eps=eps, max_iterations=max_iterations)


@pytest.mark.parametrize("guess", [1e-2, 1.0, 10.0])
def test_reaches_the_distance_it_promises(guess):
    """Whatever L was guessed: fails if the step is not shortened when the secant shows that it is too long."""
    solver = AdaptiveFista()
    solution = solve(solver, L=guess)
    assert float((solution.x - 1.0 / SCALE).norm()) <= 1e-6
    assert 5.0 < solver.L < 12.0
    assert solution.gradient_norm <= 1e-8


def test_is_as_fast_as_with_the_true_constant():
    """With the true L it takes about the iterations of FISTA: fails if momentum is lost at every turn."""
    ours, theirs = solve(AdaptiveFista()), solve(fista)
    assert ours.iterations <= 1.2 * theirs.iterations
    assert solve(AdaptiveFista(), L=0.01).iterations <= 1.2 * ours.iterations
    assert ours.iterations < 0.3 * solve(AdaptiveFista(), L=200.0).iterations


def test_one_solve_does_not_change_the_next():
    """A hard problem in between: fails if its large constant is remembered and slows down the easy one."""
    solver = AdaptiveFista()
    first = solve(solver, L=1.0).iterations
    solver(lambda x: 1e9 * x - 1.0, torch.zeros(2), mu=1e9, L=1e9, eps=1e-3, max_iterations=100)
    assert solve(solver, L=1.0).iterations == first


def test_curvature_that_grows_on_the_way():
    """Logistic curvature is small at the start and large at the solution: fails if L is only looked at once."""
    y = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)

    def lower(x, theta):
        return (x - y).square().sum().square() + 0.5 * theta * x.square().sum()

    theta, start = torch.tensor(0.5, dtype=torch.float64), 3.0 * y
    solution = solve_lower(lower, start, theta, mu=0.5, L=0.5, eps=1e-7, max_iterations=2000, solver=AdaptiveFista())
    x = solution.x.clone().requires_grad_()
    (left,) = torch.autograd.grad(lower(x, theta), x)
    assert float(left.norm()) <= 0.5e-7


def test_says_when_it_does_not_arrive():
    """Fails if a solution is returned that is not as close as it claims."""
    with pytest.raises(InnerToleranceNotReached, match=r"after 20 iterations.*max_iterations"):
        solve(AdaptiveFista(), max_iterations=20)
    with pytest.raises(InnerToleranceNotReached, match="stopped falling at the rounding of float64"):
        solve(AdaptiveFista(), eps=0.0, max_iterations=100_000)
    with pytest.raises(InnerToleranceNotReached, match="not finite"):
        AdaptiveFista()(lambda x: x / 0.0, torch.ones(2), mu=1.0, L=1.0, eps=1.0, max_iterations=5)
    with pytest.raises(ValueError, match="mu must be > 0"):
        AdaptiveFista()(lambda x: x, torch.ones(2), mu=0.0, L=1.0, eps=1.0, max_iterations=5)
