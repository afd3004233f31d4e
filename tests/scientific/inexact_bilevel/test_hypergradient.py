"""Implicit differentiation against closed forms, and the solvers of the inner problem."""

import pytest
import torch

from regularized.mechanisms.conjugate_gradient import NotPositiveDefinite
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.lower_solvers import (
    InnerToleranceNotReached,
    fista,
    gradient_descent,
    solve_lower,
)
from regularized.scientific.inexact_bilevel.problem import BilevelProblem


def ridge(n: int = 30, m: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    X, V = (torch.randn(n, m, generator=generator, dtype=torch.float64) for _ in range(2))
    y, v = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))

    def lower(w, theta):
        return 0.5 * (X @ w - y).square().sum() + 0.5 * theta.exp() * w.square().sum()

    def upper(w):
        return 0.5 * (V @ w - v).square().sum()

    return X, y, V, v, lower, upper


def test_ridge_closed_form():
    """Fails with a sign, a lost factor e^theta, or a transposed B: e^theta w^T (X^T X + e^theta I)^-1 (-grad g)."""
    X, y, V, v, lower, upper = ridge()
    theta = torch.tensor(0.3, dtype=torch.float64)
    A = X.T @ X + theta.exp() * torch.eye(6, dtype=torch.float64)
    w = torch.linalg.solve(A, X.T @ y)
    expected = theta.exp() * w @ torch.linalg.solve(A, -V.T @ (V @ w - v))
    result = hypergradient(lower, upper, w, theta, cg_tol=1e-12)
    torch.testing.assert_close(result.gradient, expected, rtol=1e-10, atol=0.0)
    assert result.inner_gradient_norm < 1e-12
    assert result.residual_norm < 1e-12

    def f(t):
        return upper(torch.linalg.solve(X.T @ X + t.exp() * torch.eye(6, dtype=torch.float64), X.T @ y))

    t = theta.clone().requires_grad_()
    torch.testing.assert_close(result.gradient, torch.autograd.grad(f(t), t)[0], rtol=1e-10, atol=0.0)


def test_identity_problem():
    """Fails when CG takes more than the one product that it needs: h = 1/2 ||x - theta||², z = grad g(theta)."""
    theta = torch.randn(5, generator=torch.Generator().manual_seed(1))
    result = hypergradient(lambda x, t: 0.5 * (x - t).square().sum(), lambda x: (x**3).sum(), theta, theta)
    torch.testing.assert_close(result.gradient, 3 * theta**2)
    assert result.cg_iterations == 1


def test_pytrees_and_direct_gradient():
    """Fails when leaves are mixed up, or theta's direct part of upper(x, theta) is left out."""
    X, y, V, v, _, _ = ridge()

    def lower(x, theta):
        w = torch.cat([x["a"].reshape(-1), x["b"]])
        return 0.5 * (X @ w - y - theta[1][0]).square().sum() + 0.5 * theta[0].exp() * w.square().sum()

    def upper(x, theta):
        w = torch.cat([x["a"].reshape(-1), x["b"]])
        return 0.5 * (V @ w - v).square().sum() + (theta[1][0] * 3.0).sum() + theta[0] ** 2

    def f(t, shift):
        A = X.T @ X + t.exp() * torch.eye(6, dtype=torch.float64)
        w = torch.linalg.solve(A, X.T @ (y + shift))
        return upper({"a": w[:4].view(2, 2), "b": w[4:]}, (t, [shift])), w

    t = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    shift = torch.full((1,), 0.2, dtype=torch.float64, requires_grad=True)
    value, w = f(t, shift)
    expected = torch.autograd.grad(value, (t, shift))
    result = hypergradient(lower, upper, {"a": w[:4].view(2, 2), "b": w[4:]}, (t, [shift]), cg_tol=1e-12)
    torch.testing.assert_close(result.gradient[0], expected[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(result.gradient[1][0], expected[1], rtol=1e-9, atol=0.0)
    assert result.q["a"].shape == (2, 2)
    assert t.grad is None and shift.grad is None  # noqa: PT018
    with torch.no_grad():
        again = hypergradient(lower, upper, {"a": w[:4].view(2, 2), "b": w[4:]}, (t, [shift]), q=result.q)
    assert again.cg_iterations == 1  # the warm start


def test_products_of_the_linearisation():
    """Fails when B and B^T do not belong together, or a product is not counted."""
    X, y, _, _, _, upper = ridge()
    theta = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def lower(w, t):
        return 0.5 * (X @ w - y).square().sum() + 0.5 * (t.exp() * w.square()).sum()

    w = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    problem = BilevelProblem(lower, upper, w, theta)
    graph = problem.linearise(w, theta)
    B = torch.diag(theta.exp() * w)
    p, q = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(graph.cross_transpose(q), B.T @ q)
    torch.testing.assert_close(graph.cross(p), B @ p)
    torch.testing.assert_close(graph.hessian(p), X.T @ (X @ p) + theta.exp() * p)
    torch.testing.assert_close(graph.gradient, problem.inner_gradient(w, theta))
    assert (problem.inner_gradients, problem.products) == (2, 4)
    torch.testing.assert_close(graph.both(q), (X.T @ (X @ q) + theta.exp() * q, B.T @ q))


@pytest.mark.parametrize("solver", [fista, gradient_descent])
@pytest.mark.parametrize("every", [1, 7])
def test_solvers_keep_their_promise(solver, every):
    """Fails when the solution is farther than eps, or the count is not that of gradients."""
    scale = torch.logspace(0, 2, 20, dtype=torch.float64)
    target = torch.randn(20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for eps in (1.0, 1e-3, 1e-7):
        calls = []

        def gradient(x, calls=calls):
            calls.append(1)
            return scale * (x - target)

        found = solver(gradient, torch.zeros(20, dtype=torch.float64), mu=1.0, L=100.0, eps=eps, check_every=every)
        assert float((found.x - target).norm()) <= eps
        assert found.iterations == len(calls)
        assert found.gradient_norm <= eps


def test_fista_is_accelerated():
    """Fails when the momentum is lost or wrong: about sqrt(L / mu) log(1 / eps) gradients, not L / mu times it."""
    scale = torch.logspace(0, 3, 50, dtype=torch.float64)
    zero = torch.zeros(50, dtype=torch.float64)
    fast = fista(lambda x: scale * (x - 1.0), zero, mu=1.0, L=1e3, eps=1e-6)
    slow = gradient_descent(lambda x: scale * (x - 1.0), zero, mu=1.0, L=1e3, eps=1e-6, max_iterations=20_000)
    assert fast.iterations < 2.0 * 32 * 15
    assert slow.iterations > 10 * fast.iterations
    assert fista(lambda x: x - 1.0, zero, mu=1.0, L=1.0, eps=1e-9).iterations == 2  # q = 1: no momentum, no 0 / 0


def test_solver_says_what_is_wrong():
    """Fails when an unsolved inner problem passes for a solved one."""
    X, _, _, _, lower, _ = ridge()
    theta, zero = torch.tensor(0.0, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    L = float(torch.linalg.eigvalsh(X.T @ X)[-1]) + 1.0
    with pytest.raises(
        InnerToleranceNotReached, match=r"after 3 iterations, not the tolerance.*max_iterations"
    ) as info:
        solve_lower(lower, zero, theta, mu=1.0, L=L, eps=1e-6, max_iterations=3)
    assert (info.value.iterations, info.value.stagnated) == (3, False)
    assert info.value.norm > info.value.tol == 1e-6
    with pytest.raises(InnerToleranceNotReached, match="rounding of float64"):
        solve_lower(lower, zero, theta, mu=1.0, L=L, eps=0.0)
    with pytest.raises(InnerToleranceNotReached, match="use float64"):
        solve_lower(
            lambda w, t: lower(w.double(), t.double()).float(), zero.float(), theta.float(), mu=1.0, L=L, eps=1e-9
        )
    with pytest.raises(InnerToleranceNotReached, match="L may be too small"):
        solve_lower(lower, zero, theta, mu=1.0, L=1.5, eps=1e-6, max_iterations=10_000)
    with pytest.raises(ValueError, match=r"mu must be > 0, got 0\.0.*ridge"):
        solve_lower(lower, zero, theta, mu=0.0, L=L, eps=1e-6)
    with pytest.raises(ValueError, match="L must be a finite number >= mu"):
        solve_lower(lower, zero, theta, mu=2.0, L=1.0, eps=1e-6)


def test_errors():
    """Fails when a disconnected or badly formed problem gives numbers."""
    w, theta = torch.ones(3), torch.ones(3)

    def lower(x, t):
        return 0.5 * (x - t).square().sum()

    def upper(x):
        return x.sum()

    def call(low=lower, up=upper, x=w, t=theta):
        return hypergradient(low, up, x, t)

    with pytest.raises(ValueError, match="does not depend on theta through the lower problem"):
        call(low=lambda x, t: 0.5 * (x - theta).square().sum())
    with pytest.raises(ValueError, match="does not depend on theta through the lower problem"):
        call(low=lambda x, t: 0.5 * x.square().sum() + t.sum())
    with pytest.raises(ValueError, match=r"lower\(x, theta\) does not depend on x"):
        call(low=lambda x, t: t.sum())
    with pytest.raises(ValueError, match=r"upper\(x\) does not depend on x"):
        call(up=lambda x: torch.ones(()))
    with pytest.raises(NotPositiveDefinite, match="ridge"):
        call(low=lambda x, t: -0.5 * x.square().sum() + (x * t).sum())
    with pytest.raises(NotPositiveDefinite, match="ridge"):
        call(low=lambda x, t: (x * t).sum())
    with pytest.raises(ValueError, match=r"must return one number as a tensor, got shape \(3,\)"):
        call(up=lambda x: x)
    with pytest.raises(ValueError, match=r"must return one number as a tensor, got float"):
        call(low=lambda x, t: 1.0)
    with pytest.raises(ValueError, match="x must be floating point"):
        call(x=torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="theta must be a tensor or a tuple"):
        call(t=1.0)
    with pytest.raises(ValueError, match="one dtype and device"):
        call(t=(torch.ones(1), torch.ones(1).double()))
    held = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"write it as upper\(x, theta\)"):
        call(up=lambda x: (x * held).sum(), t=held)
    with pytest.raises(ValueError, match=r"upper must be upper\(x\), or upper\(x, theta\)"):
        call(up=lambda x, t, other: x.sum())


def test_which_arguments_upper_takes():
    """Fails when a default argument or a module's own signature is taken for theta."""
    x = theta = torch.ones(2)

    class Module(torch.nn.Module):
        def forward(self, x, theta):
            return (x * theta).sum()

    data = torch.ones(2)
    for upper, takes in (
        (lambda x, data=data: (x * data).sum(), False),
        (lambda x, theta: (x * theta).sum(), True),
        (Module(), True),
        (torch.sum, False),
    ):
        assert BilevelProblem(lambda x, t: (x * t).sum(), upper, x, theta).upper_takes_theta is takes


def test_fista_is_the_recursion_of_its_docstring():
    """Fails when the momentum is another one (Nesterov's without strong convexity, for one)."""
    scale = torch.logspace(0, 2, 6, dtype=torch.float64)
    mu, L, q = 1.0, 100.0, 0.01
    points = []

    def gradient(z):
        points.append(z)
        return scale * (z - 1.0)

    fista(gradient, torch.zeros(6, dtype=torch.float64), mu=mu, L=L, eps=1e-3)
    x = old = torch.zeros(6, dtype=torch.float64)
    t = 0.0
    for z in points:
        t_old, t = t, (1 - q * t**2 + ((1 - q * t**2) ** 2 + 4 * t**2) ** 0.5) / 2
        expected = x + (t_old - 1) * (1 - t * q) / (t * (1 - q)) * (x - old)
        torch.testing.assert_close(z, expected)
        old, x = x, expected - scale * (expected - 1.0) / L
    assert len(points) > 20
