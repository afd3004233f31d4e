"""Train many hyperparameters on a validation loss without choosing a tolerance or a step size: MAID.

M. S. Salehi, S. Mukherjee, L. Roberts, M. J. Ehrhardt: An adaptively inexact first-order method for bilevel
optimization with application to hyperparameter learning, 2023, arXiv 2308.10098. Official code:
MohammadSadeghSalehi/MAID at 6986372, without a licence.

    min over theta of  f(theta) = g(x*(theta)),   x*(theta) = argmin over x of h(x, theta)

===========  ==================  ==============================================================================
paper        here                meaning
===========  ==================  ==============================================================================
h, g         ``lower, upper``    strongly convex and smooth in x; smooth
x~           ``x``               inner solution, ``||grad_x h|| / mu <= eps``, so ``||x~ - x*|| <= eps``
eps, delta   ``eps, delta``      accuracies of inner and linear solve; adapted
q, z         ``q, z``            ``||A q - grad g|| <= delta``; ``z = -B^T q``, the hypergradient
omega        ``bound``           on ``||z - grad f||``, see ``bilevel_bound``
beta         ``step``            first step size that is tried; adapted
eta          ``eta``             share of the decrease that is asked for, and of z that must be right
rho          ``rho``             factor between trial steps
tau, nu      ``tau, nu``         factors of eps and delta after failure, and after success
===========  ==================  ==============================================================================

Paper and code differ; we follow the paper: the first loss is that of the inner solution, not of the given x; eta, not
its square, in the decrease; function values of the accuracy that the test assumes; CG returns 0 for a small right-hand
side; all in the dtype of the problem. The loop as it is in the code is
:class:`~regularized.scientific.inexact_bilevel.official.OfficialMAID`.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, at_least
from regularized.scientific.inexact_bilevel.bound import (
    BilevelConstants,
    ErrorBound,
    EstimatedBound,
    Inexact,
    RigorousBound,
)
from regularized.scientific.inexact_bilevel.descent import (
    ABOVE_ZERO,
    INSIDE,
    BilevelDescent,
    BilevelStep,
    OfTheta,
    Status,
)
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached, LowerSolver, fista
from regularized.scientific.inexact_bilevel.problem import Lower, Tree, Upper, norm

__all__ = ["MAID"]

_BACKTRACKS = 10  # trial steps of a line search, and one more after each failure; official code
_ROUNDS = 3  # tighten and retry within one step; official code


class MAID(BilevelDescent):
    """Method of adaptive inexact descent.

    A step computes a hypergradient whose error is known to be smaller than itself, tightening the accuracies until it
    is, and searches along it for a decrease that inexact function values can prove. Where they cannot, accuracies are
    tightened; after success they are loosened.

    Cost of a step beside plain descent with the same accuracy: one inner solve, from a warm start, for each trial step.

    *Not* for mini-batches or a network inside: the lower problem must be fixed, smooth and strongly convex. Use
    float64: eps soon is smaller than what float32 can resolve.

    Args:
        lower: ``lower(x, theta)``, a scalar; twice differentiable in x. Where the data term is a mean, so is mu.
        upper: ``upper(x)``, or ``upper(x, theta)`` where theta enters directly too; which, is read off its signature.
        theta: start of the outer variable: a tensor, or tuples, lists and dictionaries of tensors. Take logarithms of
            what must stay positive.
        x: start of the inner variable, likewise.
        mu: least curvature of ``lower`` in x, > 0: a number, or a function of theta.
        L: largest, likewise.
        eps: first accuracy of the inner solution; default 0.1.
        delta: first accuracy of the linear solve; default 0.1.
        step: first trial step; default 0.01 (official code). It grows by ``growth`` at each success.
        eta: default 1e-4.
        rho: default 0.5, that of the experiments; the class of the official code has 0.9.
        tau: default 0.5.
        nu: default 1.05; at least 1.
        growth: of the step after success; default 10 / 9 (rho up, official code).
        bound: ``"heuristic"`` (default) estimates the constants of the error bound that are not given,
            ``"rigorous"`` wants them all.
        constants: those that are known.
        convex: the upper loss is convex in x (default, as squared error and cross-entropy are); False allows for one
            more error term in the line search.
        tolerance: the end, ``"stationary"``, is where ``||z|| + omega`` is below it; default 1e-8.
        max_inner: gradients in an inner solve at most; default 2000, the official code's, which goes on with what
            it has then. A trial step whose problem needs more is rejected.
        max_cg: CG iterations at most; default 2000 (official code).
        lower_solver: of the inner problem; default :func:`~regularized.scientific.inexact_bilevel.lower_solvers.fista`,
            the paper's.
        deterministic: False says that you know that an objective returns something else on every call; default True.

    Raises:
        ValueError: a setting is out of range or missing; an objective is not deterministic, or not connected with x or
            theta.
        NotPositiveDefinite: (in a step) the lower problem is not strongly convex.
        InnerToleranceNotReached: (in a step) ``max_inner`` iterations are not enough at the present theta.

    Examples:
        >>> import torch
        >>> X, y, V, v = (torch.randn(20, *s, dtype=torch.float64) for s in ((5,), (), (5,), ()))
        >>> opt = MAID(
        ...     lower=lambda w, t: 0.5 * (X @ w - y).square().mean() + 0.5 * (t.exp() * w.square()).sum(),
        ...     upper=lambda w: 0.5 * (V @ w - v).square().mean(),
        ...     theta=torch.zeros(5, dtype=torch.float64),
        ...     x=torch.zeros(5, dtype=torch.float64),
        ...     mu=lambda t: t.exp().min(),
        ...     L=lambda t: torch.linalg.matrix_norm(X, 2) ** 2 / 20 + t.exp().max(),
        ...     step=1.0,
        ... )
        >>> log = opt.run(5)
        >>> log[-1].loss < log[0].loss
        True
    """

    @allowed(
        eps=ABOVE_ZERO,
        delta=ABOVE_ZERO,
        step=ABOVE_ZERO,
        tolerance=ABOVE_ZERO,
        eta=INSIDE,
        rho=INSIDE,
        tau=INSIDE,
        nu=at_least(1.0),
        growth=at_least(1.0),
        bound=Choice("heuristic", "rigorous"),
    )
    def __init__(
        self,
        lower: Lower,
        upper: Upper,
        theta: Tree,
        x: Tree,
        *,
        mu: OfTheta | None = None,
        L: OfTheta | None = None,
        eps: float = 1e-1,
        delta: float = 1e-1,
        step: float = 0.01,
        eta: float = 1e-4,
        rho: float = 0.5,
        tau: float = 0.5,
        nu: float = 1.05,
        growth: float = 10 / 9,
        bound: Literal["heuristic", "rigorous"] = "heuristic",
        constants: BilevelConstants | None = None,
        convex: bool = True,
        tolerance: float = 1e-8,
        max_inner: int = 2000,
        max_cg: int = 2000,
        lower_solver: LowerSolver = fista,
        deterministic: bool = True,
    ) -> None:
        super().__init__(
            lower,
            upper,
            theta,
            x,
            mu=mu,
            L=L,
            max_inner=max_inner,
            max_cg=max_cg,
            lower_solver=lower_solver,
            deterministic=deterministic,
        )
        self.eta = eta
        self.rho = rho
        self.tau = tau
        self.nu = nu
        self.growth = growth
        self.convex = convex
        self.tolerance = tolerance
        make: Any = EstimatedBound if bound == "heuristic" else RigorousBound
        self._bound: ErrorBound = make(self.problem, constants or BilevelConstants())
        self.eps: float = eps
        self.delta: float = delta
        self.step_size: float = step
        self._failures = 0  # line searches that failed since the last success

    def step(self) -> BilevelStep:
        """One outer step: hypergradient and line search, at most three times with tightened accuracies."""
        status: Status = "tightened"
        loss, loss_error, taken, z_norm, omega = math.nan, math.nan, 0.0, math.nan, math.nan
        eps, delta = self.eps, self.delta
        try:
            for _ in range(_ROUNDS):
                if self.exhausted and not math.isnan(loss):
                    break
                loss, at, omega = self._descent_direction()
                z_norm, eps, delta = norm(at.z), self.eps, self.delta
                L_g = self._bound.upper_lipschitz(at.x, at.theta)
                loss_error = norm(at.upper_gradient) * eps + 0.5 * L_g * eps**2
                if z_norm + omega <= self.tolerance:
                    status = "stationary"
                    break
                found = self._line_search(loss, at, L_g)
                if found is not None:
                    taken, loss, loss_error, self._theta, self._x = found
                    status = "descended"
                    self.step_size = taken * self.growth
                    self._loosen()
                    break
                self._tighten()
                self._failures += 1
        except InnerToleranceNotReached as error:
            if not error.stagnated:
                raise
            status = "stagnated"
            if math.isnan(loss):
                loss = float(self.problem.upper_gradient(self._x, self._theta)[0])
        return self.report(
            status,
            loss=loss,
            loss_error=loss_error,
            gradient_norm=z_norm,
            bound=omega,
            eps=eps,
            delta=delta,
            step_size=taken,
        )

    def _descent_direction(self) -> tuple[float, Inexact, float]:
        """g, a hypergradient with ``omega <= (1 - eta) ||z||``, and omega; or one that is 0 within tolerance."""
        graph = None
        while True:
            graph = self.accurate(self.eps, graph)
            loss, at = self.inexact_gradient(graph, self.delta)
            omega = self._bound.omega(at, self.eps, self.delta)
            z_norm = norm(at.z)
            if not math.isfinite(loss + z_norm + omega):
                raise ValueError(
                    f"upper loss {loss:.3g}, hypergradient {z_norm:.3g}, error bound {omega:.3g}: not finite; look for "
                    "0 / 0 or log 0 in the objectives"
                )
            if omega <= (1.0 - self.eta) * z_norm or z_norm + omega <= self.tolerance:
                return loss, at, omega
            self._tighten()

    def _line_search(self, loss: float, at: Inexact, L_g: float) -> tuple[float, float, float, Tensor, Tensor] | None:
        """The first trial step whose decrease inexact values can prove: step, loss, its error, theta, x."""
        squared = norm(at.z) ** 2
        curved = 0.5 * L_g * self.eps**2
        # f(theta) >= g(x~) - ||grad g|| eps, and less L_g / 2 eps² where g is not convex.
        below = loss - norm(at.upper_gradient) * self.eps - (0.0 if self.convex else curved)
        numbers = itertools.takewhile(lambda i: not (i and self.exhausted), range(_BACKTRACKS + self._failures))
        steps = (self.step_size * self.rho**i for i in numbers)
        for a, theta, x, value, by_x in self.trials(at.theta, at.z, steps, self.eps):
            error = norm(by_x) * self.eps + curved
            if value + error - below <= -self.eta * a * squared:
                return a, value, error, theta, x
        return None

    def _tighten(self) -> None:
        self.eps *= self.tau
        self.delta *= self.tau

    def _loosen(self) -> None:
        self.eps *= self.nu
        self.delta *= self.nu
        self._failures = 0
        self._bound.moved()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            **super().state_dict(),
            "eps": self.eps,
            "delta": self.delta,
            "step_size": self.step_size,
            "failures": self._failures,
            "bound": self._bound.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on from a state; the next steps are bit for bit those that would have followed it.

        Raises:
            ValueError: it is that of another problem.
        """
        super().load_state_dict(state)
        self.eps, self.delta, self.step_size = state["eps"], state["delta"], state["step_size"]
        self._failures = state["failures"]
        self._bound.load_state_dict(state["bound"])
        return self
