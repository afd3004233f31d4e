"""The adaptive bilevel method as its official code has it (MohammadSadeghSalehi/MAID at 6986372), for comparison only.

What differs from :class:`~regularized.scientific.inexact_bilevel.MAID`, and why that does not do it:

1. The first loss is g at the x that the user gave. If that is below what any theta reaches, no step is ever taken.
2. Decrease is asked for with eta² instead of eta.
3. The stored loss is that of the last accepted point with the accuracy of then, also after tightening.
4. ``||B||`` is ``max |B z|``; L_B and L_Ainv are secants between x and pure noise; L_g is missing in two terms.
5. CG starts at 0, and returns the point it is called at where the right-hand side is below the tolerance.
6. Each inner solve of a step starts at the same x; the cap on inner iterations passes silently.

The code also rounds q to float32, which is left out here: its traces agree to 1e-6 all the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regularized.mechanisms.conjugate_gradient import conjugate_gradient
from regularized.scientific.inexact_bilevel.descent import BilevelDescent, BilevelStep, OfTheta
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached, LowerSolver, fista
from regularized.scientific.inexact_bilevel.problem import Linearised, Lower, Tree, Upper, norm

__all__ = ["OfficialMAID", "OfficialTrace"]


@dataclass(slots=True)
class OfficialTrace:
    """What the official code records, under its names.

    Args:
        loss: first loss and that of each accepted step.
        step_size: of each accepted step.
        eps: at the start, after each failed line search, and after each iteration.
        delta: likewise.
        ll_calls: inner iterations at the start and after each accepted step, one less than gradients in each solve.
        cg_calls: CG iterations likewise.
        bound_calls: omega, ``||z||``, eps and delta of each evaluated bound.
    """

    loss: list[float] = field(default_factory=list)
    step_size: list[float] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)
    ll_calls: list[int] = field(default_factory=list)
    cg_calls: list[int] = field(default_factory=list)
    bound_calls: list[tuple[float, float, float, float]] = field(default_factory=list)


class OfficialMAID(BilevelDescent):
    """The official loop. Do not use it for your own problems.

    Args:
        lower: as in :class:`~regularized.scientific.inexact_bilevel.MAID`.
        upper: as there; ``upper(x)`` only.
        theta: as there.
        x: as there, with the influence that note 1 tells of.
        mu: as there.
        L: as there.
        Lg: Lipschitz constant of the upper loss's gradient.
        eps: as there.
        delta: as there.
        step: as there.
        eta: as there.
        rho: default 0.9, that of the class.
        tau: as there.
        nu: as there.
        perturbations: vectors like x for the secants, two for each bound; default normal draws.
        max_inner: as there.
        max_cg: as there.
        lower_solver: as there.

    Attributes:
        trace: what was recorded.

    Examples:
        >>> opt = OfficialMAID(
        ...     lambda x, t: 0.5 * (x - t).square().sum(), lambda x: 0.5 * (x - 1.0).square().sum(),
        ...     torch.zeros(2), torch.zeros(2), mu=1.0, L=1.0, Lg=1.0, step=0.5
        ... )
        >>> opt.run(3)[-1].loss < opt.trace.loss[0]
        True
    """

    def __init__(
        self,
        lower: Lower,
        upper: Upper,
        theta: Tree,
        x: Tree,
        *,
        mu: OfTheta,
        L: OfTheta,
        Lg: float,
        eps: float = 1e-1,
        delta: float = 1e-1,
        step: float = 0.1,
        eta: float = 1e-4,
        rho: float = 0.9,
        tau: float = 0.5,
        nu: float = 1.05,
        perturbations: Iterator[Tensor] | None = None,
        max_inner: int = 2000,
        max_cg: int = 2000,
        lower_solver: LowerSolver = fista,
    ) -> None:
        super().__init__(
            lower, upper, theta, x, mu=mu, L=L, max_inner=max_inner, max_cg=max_cg, lower_solver=lower_solver
        )
        if self.problem.upper_takes_theta:
            raise ValueError("the official code knows upper(x) only; use MAID for upper(x, theta)")
        self.Lg = Lg
        self.eps: float = eps
        self.delta: float = delta
        self.step_size: float = step
        self.eta = eta
        self.rho = rho
        self.tau = tau
        self.nu = nu
        self._perturbations = perturbations
        self._cross_lipschitz = self._inverse_lipschitz = 0.0
        self._ll_calls = self._cg_calls = 0
        first = float(self.problem.upper_gradient(self._x, self._theta)[0])
        self.trace: OfficialTrace = OfficialTrace([first], [], [eps], [delta], [0], [0])

    def step(self) -> BilevelStep:
        """One outer iteration: at most three rounds of hypergradient and line search."""
        taken, z_norm, omega = 0.0, 0.0, 0.0
        eps, delta = self.eps, self.delta
        for round_ in range(3):
            z, omega = self._descent_direction()
            z_norm, eps, delta = norm(z), self.eps, self.delta
            taken = self._backtrack(z, 10 + round_)
            if taken:
                self.step_size *= 10 / 9
                self.eps *= self.nu
                self.delta *= self.nu
                break
            self.trace.eps.append(self.eps)
            self.trace.delta.append(self.delta)
            self.eps *= self.tau
            self.delta *= self.tau
        self.trace.eps.append(self.eps)
        self.trace.delta.append(self.delta)
        return self.report(
            "descended" if taken else "tightened",
            loss=self.trace.loss[-1],
            gradient_norm=z_norm,
            bound=omega,
            eps=eps,
            delta=delta,
            step_size=taken,
        )

    def _descent_direction(self) -> tuple[Tensor, float]:
        while True:
            x = self._capped_solve(self._theta)
            graph = self.problem.linearise(x, self._theta)
            _, by_x, _ = self.problem.upper_gradient(x, self._theta)
            q = self._cg(graph, by_x, x)
            z = -graph.cross_transpose(q)
            omega = self._bound(graph, by_x, q, z)
            self.trace.bound_calls.append((omega, norm(z), self.eps, self.delta))
            if not omega / norm(z) > 1.0 - self.eta:
                self._x = x
                return z, omega
            self.eps *= self.tau
            self.delta *= self.tau

    def _bound(self, graph: Linearised, by_x: Tensor, q: Tensor, z: Tensor) -> float:
        mu, _ = self.constants(self._theta)
        cross = float(graph.cross(z).abs().max())
        first, second = self._noise(), self._noise()
        moved = -self.problem.linearise(first, self._theta).cross_transpose(q)
        self._cross_lipschitz = max(self._cross_lipschitz, norm(moved - z) / norm(q))
        other = self._cg(self.problem.linearise(second, self._theta), by_x, second)
        self._inverse_lipschitz = max(self._inverse_lipschitz, norm(other - q) / norm(by_x))
        size = norm(by_x)
        c = cross / mu + self._inverse_lipschitz * size * cross + self._cross_lipschitz * size / mu
        return c * self.eps + cross / mu * self.delta + self._cross_lipschitz / mu * self.eps**2

    def _backtrack(self, z: Tensor, trials: int) -> float:
        size_old = norm(self.problem.upper_gradient(self._x, self._theta)[1])
        squared = norm(z) ** 2
        for i in range(trials):
            a = self.step_size * self.rho**i
            theta = self._theta - a * z
            x = self._capped_solve(theta)
            value, by_x, _ = self.problem.upper_gradient(x, theta)
            errors = (norm(by_x) + size_old) * self.eps + 0.5 * self.Lg * self.eps**2
            if float(value) + errors - self.trace.loss[-1] <= -a * self.eta * self.eta * squared:
                self._theta, self._x, self.step_size = theta, x, a
                self.trace.step_size.append(a)
                self.trace.loss.append(float(value))
                self.trace.ll_calls.append(self._ll_calls)
                self.trace.cg_calls.append(self._cg_calls)
                return a
        return 0.0

    def _capped_solve(self, theta: Tensor) -> Tensor:
        before = self.problem.inner_gradients
        try:
            x = self.solve(theta, self.eps)
        except InnerToleranceNotReached as error:
            x = error.x
        self._ll_calls += self.problem.inner_gradients - before - 1
        return x

    def _cg(self, graph: Linearised, b: Tensor, at: Tensor) -> Tensor:
        solved = conjugate_gradient(graph.hessian, b, tol=self.delta, max_iterations=self.max_cg)
        self._cg_calls += solved.iterations
        return solved.solution if solved.iterations else at

    def _noise(self) -> Tensor:
        if self._perturbations is None:
            return torch.randn_like(self._x)
        return next(self._perturbations).to(self._x).reshape(-1)
