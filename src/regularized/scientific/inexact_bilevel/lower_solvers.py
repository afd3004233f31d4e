"""Solve a smooth, strongly convex problem to a known distance from its solution.

``||grad h(x)|| / mu <= eps`` is a bound on ``||x - x*||``, so the tolerance of these solvers is a distance. FISTA for
strongly convex functions (Chambolle & Pock 2016, algorithm 5) with q = mu / L:

    t <- (1 - q t² + sqrt((1 - q t²)² + 4 t²)) / 2,   z = x + (t_old - 1)(1 - t q) / (t (1 - q)) (x - x_old),
    x <- z - grad h(z) / L
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regularized.scientific.inexact_bilevel.problem import BilevelProblem, Lower, Tree

__all__ = ["InnerToleranceNotReached", "LowerSolution", "LowerSolver", "fista", "gradient_descent", "solve_lower"]


class InnerToleranceNotReached(RuntimeError):
    """The inner problem was not solved to the accuracy that was asked for, so nothing built on it can be trusted.

    Args:
        norm: ``||grad_x h||`` that was reached.
        tol: what it had to be: ``mu eps``.
        iterations: gradients taken.
        stagnated: whether it had stopped falling, so that more iterations would not have helped.
        x: the last point, a flat vector.
    """

    def __init__(self, norm: float, tol: float, iterations: int, *, stagnated: bool, x: Tensor) -> None:
        dtype = x.dtype
        if not math.isfinite(norm):
            advice = "Its values are not finite: L may be too small for this objective, or it holds 0 / 0 or log 0"
        elif stagnated and dtype != torch.float64:
            advice = f"It stopped falling at the rounding of {dtype}: use float64, or a larger eps"
        elif stagnated:
            advice = "It stopped falling at the rounding of float64: use a larger eps, or scale the objective"
        else:
            advice = "Raise max_iterations (max_inner), or see whether mu and L are those of this objective"
            if dtype != torch.float64:
                advice += f"; {dtype} may be too coarse for this tolerance, use float64"
        super().__init__(
            f"the inner solver reached ||grad_x h|| = {norm:.3g} after {iterations} iterations, not the tolerance mu "
            f"eps = {tol:.3g}. {advice}"
        )
        self.norm = norm
        self.tol = tol
        self.iterations = iterations
        self.stagnated = stagnated
        self.x = x


@dataclass(frozen=True, slots=True)
class LowerSolution:
    """What a solver returns.

    Args:
        x: the solution, at most eps away from the exact one.
        gradient_norm: ``||grad_x h||`` at the last point where it was taken, at most ``mu eps``.
        iterations: gradients taken.
    """

    x: Tree
    gradient_norm: float
    iterations: int


class LowerSolver(Protocol):
    """A solver on flat vectors, as :class:`~regularized.scientific.inexact_bilevel.MAID` calls it."""

    def __call__(
        self,
        gradient: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        mu: float,
        L: float,
        eps: float,
        max_iterations: int,
    ) -> LowerSolution:
        """A point at most eps away from the zero of ``gradient``, from the warm start x.

        Raises:
            InnerToleranceNotReached: there is none within the iterations.
        """
        ...


def fista(
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    mu: float,
    L: float,
    eps: float,
    max_iterations: int = 2000,
    check_every: int | None = None,
) -> LowerSolution:
    """Accelerated gradient descent for a mu-strongly convex, L-smooth function, from its gradient.

    When the test passes, the step that its gradient allows is taken still, as it costs nothing more and leads closer.

    Args:
        gradient: of h, a vector like x.
        x: warm start.
        mu: constant of strong convexity, > 0.
        L: Lipschitz constant of the gradient, >= mu.
        eps: distance to the solution that is wanted, >= 0.
        max_iterations: gradients at most; default 2000.
        check_every: iterations between tests, each of which waits for the device. Default 1 on a CPU, 10 elsewhere.

    Returns:
        The solution.

    Raises:
        InnerToleranceNotReached: the tolerance was not reached.
        ValueError: mu, L or eps is out of range.

    Examples:
        >>> scale = torch.tensor([1.0, 10.0], dtype=torch.float64)
        >>> solution = fista(lambda x: scale * x - 1.0, torch.zeros(2, dtype=torch.float64), mu=1.0, L=10.0, eps=1e-6)
        >>> [round(value, 5) for value in solution.x.tolist()]
        [1.0, 0.1]
    """
    check_constants(mu, L, eps)
    test = _Test(x, mu, L, eps, max_iterations, check_every)
    q = mu / L
    t_old = 1.0  # what the recursion makes of t = 0 in the first iteration: no momentum yet
    z = old = x.detach()
    for iteration in range(1, max_iterations + 1):
        p = gradient(z)
        new = torch.sub(z, p, alpha=1.0 / L)
        if test.passed(p, new, iteration):
            return LowerSolution(new, test.norm, iteration)
        t, share = momentum(q, t_old)
        z, old, t_old = torch.lerp(old, new, 1.0 + share), new, t
    raise test.failure(max_iterations)


def momentum(q: float, t_old: float) -> tuple[float, float]:
    """The recursion of :func:`fista` for q = mu / L: the next t, and the share of the last move that is added."""
    t = (1.0 - q * t_old**2 + math.sqrt((1.0 - q * t_old**2) ** 2 + 4.0 * t_old**2)) / 2.0
    return t, (t_old - 1.0) * (1.0 - t * q) / (t * (1.0 - q)) if q < 1.0 else 0.0


def gradient_descent(
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    mu: float,
    L: float,
    eps: float,
    max_iterations: int = 2000,
    check_every: int | None = None,
) -> LowerSolution:
    """Plain gradient descent with step 1 / L; arguments, result and errors as in :func:`fista`.

    Returns the first point that passes the test, itself.

    Examples:
        >>> gradient_descent(lambda x: x - 1.0, torch.zeros(2), mu=1.0, L=1.0, eps=1e-6)
        LowerSolution(x=tensor([1., 1.]), gradient_norm=0.0, iterations=2)
    """
    check_constants(mu, L, eps)
    test = _Test(x, mu, L, eps, max_iterations, check_every)
    x = x.detach()
    for iteration in range(1, max_iterations + 1):
        p = gradient(x)
        new = torch.sub(x, p, alpha=1.0 / L)
        if test.passed(p, new, iteration):
            return LowerSolution(x, test.norm, iteration)
        x = new
    raise test.failure(max_iterations)


def solve_lower(
    lower: Lower,
    x: Tree,
    theta: Tree,
    *,
    mu: float,
    L: float,
    eps: float,
    max_iterations: int = 2000,
    solver: LowerSolver = fista,
) -> LowerSolution:
    """Minimise ``lower(x, theta)`` over x, to a distance of eps from the solution.

    Args:
        lower: a scalar; mu-strongly convex and L-smooth in x.
        x: warm start: a tensor, or tuples, lists and dictionaries of tensors.
        theta: likewise; fixed.
        mu: > 0.
        L: >= mu.
        eps: > 0; below 1e-6 use float64.
        max_iterations: gradients at most; default 2000.
        solver: :func:`fista` (default), :func:`gradient_descent`, or your own.

    Returns:
        The solution, like x.

    Raises:
        InnerToleranceNotReached: the tolerance was not reached.
        ValueError: a constant is out of range, or lower does not depend on x.

    Examples:
        >>> y = torch.tensor([1.0, 3.0])
        >>> solve_lower(lambda x, t: 0.5 * (x - y).square().sum() + 0.5 * t * x.square().sum(),
        ...     torch.zeros(2), torch.tensor(1.0), mu=2.0, L=2.0, eps=1e-5).x
        tensor([0.5000, 1.5000])
    """
    problem = BilevelProblem(lower, _no_upper, x, theta)
    flat_theta = problem.theta_shape.flatten(theta)
    solution = solver(
        lambda flat: problem.inner_gradient(flat, flat_theta),
        problem.x_shape.flatten(x),
        mu=mu,
        L=L,
        eps=eps,
        max_iterations=max_iterations,
    )
    return LowerSolution(problem.x_shape.unflatten(solution.x), solution.gradient_norm, solution.iterations)


def _no_upper(x: Tree) -> Tensor:
    raise NotImplementedError


def check_constants(mu: float, L: float, eps: float) -> None:
    """Refuse constants that no strongly convex problem has.

    Raises:
        ValueError: with what is allowed.
    """
    if not (math.isfinite(mu) and mu > 0.0):
        raise ValueError(
            f"mu must be > 0, got {mu}: the lower problem must be strongly convex. Add ridge, mu / 2 * "
            "x.square().sum(), and pass that mu"
        )
    if not (mu <= L < math.inf):
        raise ValueError(f"L must be a finite number >= mu = {mu}, got {L}: it is the largest curvature, mu the least")
    if not eps >= 0.0:
        raise ValueError(f"eps must be a number >= 0, got {eps}")


class _Test:
    """``||grad|| <= mu eps``, looked at now and then; stops where rounding lets the norm fall no further."""

    def __init__(
        self, x: Tensor, mu: float, L: float, eps: float, max_iterations: int, check_every: int | None
    ) -> None:
        self.norm = math.inf
        self._tol = mu * eps
        self._x = x
        self._last = max_iterations
        self._every = check_every or (1 if x.device.type == "cpu" else 10)
        # No new best norm for this long is rounding: meanwhile gradient descent would have contracted it by e.
        self._patience = 100 + int(L / mu)
        # It is seen sooner where a gradient is no more than the rounding of its own evaluation.
        self._rounding = 32.0 * torch.finfo(x.dtype).eps * L
        self._best = math.inf
        self._since = 0

    def passed(self, gradient: Tensor, new: Tensor, iteration: int) -> bool:
        if iteration % self._every and iteration != self._last and iteration != 1:
            return False
        self.norm, self._x = float(torch.linalg.vector_norm(gradient)), new
        if self.norm <= self._tol:
            return True
        if not math.isfinite(self.norm):
            raise self.failure(iteration)
        if self.norm < self._best:
            self._best, self._since = self.norm, iteration
        else:
            stuck = iteration - self._since
            if stuck >= self._patience or (
                stuck >= 20 and self.norm <= self._rounding * float(torch.linalg.vector_norm(new))
            ):
                raise self.failure(iteration, stagnated=True)
        return False

    def failure(self, iterations: int, *, stagnated: bool = False) -> InnerToleranceNotReached:
        return InnerToleranceNotReached(self.norm, self._tol, iterations, stagnated=stagnated, x=self._x)
