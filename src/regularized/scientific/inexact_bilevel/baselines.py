"""What adaptive accuracies are compared with: prescribed schedules (HOAG), and one accuracy for all steps.

F. Pedregosa: Hyperparameter optimization with approximate gradient, ICML 2016. In the official code of the adaptive
method a rejected step of HOAG leaves theta where it went, and so rejects for ever; here it goes back to the last
accepted point.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias

from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, at_least
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

__all__ = ["HOAG", "AccuracySchedule", "FixedAccuracy"]

AccuracySchedule: TypeAlias = Literal["geometric", "quadratic", "cubic"]
_TRIALS = 10


class HOAG(BilevelDescent):
    """Descent with accuracies that follow a schedule, and a step size that follows the loss.

    A step solves both systems to eps_k, judges the last move by the loss that it led to, and moves on: the step size
    grows by 1 / 0.95 where the loss fell enough, and halves, going back, where it grew by a fifth or the lower problem
    could not be solved.

    Args:
        lower: as in :class:`~regularized.scientific.inexact_bilevel.MAID`.
        upper: as there.
        theta: as there.
        x: as there.
        mu: as there.
        L: as there.
        eps: first accuracy of both solves; default 0.1.
        schedule: ``"geometric"`` (default): ``eps 0.9^k``; ``"quadratic"``: ``eps / (k + 1)²``; ``"cubic"``: likewise,
            to the power of 3.
        step: first step size; default None: ``sqrt(d) / ||z||``, HOAG's own.
        max_inner: as there.
        max_cg: as there.
        lower_solver: as there.
        deterministic: as there.

    Raises:
        ValueError: a setting is out of range.
        InnerToleranceNotReached: (in a step) the schedule asks for more than the inner solver can do.

    Examples:
        >>> import torch
        >>> opt = HOAG(
        ...     lambda x, t: 0.5 * (x - t).square().sum(), lambda x: 0.5 * (x - 1.0).square().sum(),
        ...     torch.zeros(2), torch.zeros(2), mu=1.0, L=1.0, step=0.5
        ... )
        >>> [round(info.loss, 2) for info in opt.run(3)]
        [1.0, 0.22, 0.04]
    """

    @allowed(eps=ABOVE_ZERO, step=ABOVE_ZERO.or_none(), schedule=Choice("geometric", "quadratic", "cubic"))
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
        schedule: AccuracySchedule = "geometric",
        step: float | None = None,
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
        self.schedule = schedule
        self._first_eps = eps
        self._k = 0
        self._tightened = 1.0
        self._lipschitz = None if step is None else 1.0 / step  # L_lambda
        self._accepted: tuple[Tensor, Tensor, Tensor] | None = None  # theta, x and z of the last accepted point
        self._accepted_loss = math.inf

    @property
    def eps(self) -> float:
        """Accuracy of the next step."""
        return self._scheduled(self._k)

    def step(self) -> BilevelStep:
        """Hypergradient at theta, verdict on the move that led there, and the next move."""
        eps = self.eps
        if self._accepted is not None:
            try:
                if not self.solvable(self._theta):
                    return self._reject(eps, math.nan)
                graph = self.accurate(eps)
            except InnerToleranceNotReached:
                return self._reject(eps, math.nan)
        else:
            graph = self.accurate(eps)
        loss, at = self.inexact_gradient(graph, eps)
        z, z_norm = at.z, norm(at.z)
        if self._lipschitz is None:
            self._lipschitz = z_norm / math.sqrt(z.numel()) if z_norm > 1e-3 else 1.0
        move = z_norm / self._lipschitz
        following = self._scheduled(self._k + 1)
        # C = 0.25, and the factor of L_lambda is 1, in HOAG and here.
        allowed = self._accepted_loss + 0.25 * following + 1.25 * eps * move - self._lipschitz * move**2
        if self._accepted is not None and not loss <= allowed and not loss < 1.2 * self._accepted_loss:
            return self._reject(eps, z_norm)
        if loss <= allowed:
            self._lipschitz *= 0.95
        self._accepted, self._accepted_loss = (self._theta, self._x, z), loss
        return self._move("descended", eps, z_norm)

    def _reject(self, eps: float, z_norm: float) -> BilevelStep:
        """Go back to the last accepted point, to leave it again with half the step and twice the accuracy."""
        assert self._lipschitz is not None
        self._lipschitz *= 2.0
        self._tightened *= 0.5
        return self._move("rejected", eps, z_norm)

    def _move(self, status: Status, eps: float, z_norm: float) -> BilevelStep:
        assert self._lipschitz is not None
        assert self._accepted is not None
        theta, self._x, z = self._accepted
        self._theta = theta - z / self._lipschitz
        self._k += 1
        step_size = 1.0 / self._lipschitz
        return self.report(
            status, loss=self._accepted_loss, gradient_norm=z_norm, eps=eps, delta=eps, step_size=step_size
        )

    @property
    def accepted_theta(self) -> Tree:
        """The theta whose loss the last step reported; :attr:`theta` is the one that is tried next."""
        accepted = self._theta if self._accepted is None else self._accepted[0]
        return self.problem.theta_shape.unflatten(accepted.clone())

    def _scheduled(self, k: int) -> float:
        factor = {"geometric": 0.9**k, "quadratic": (k + 1.0) ** -2, "cubic": (k + 1.0) ** -3}[self.schedule]
        return max(self._first_eps * factor * self._tightened, 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            **super().state_dict(),
            "k": self._k,
            "tightened": self._tightened,
            "lipschitz": self._lipschitz,
            "accepted": None if self._accepted is None else [part.clone() for part in self._accepted],
            "accepted_loss": self._accepted_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on from a state.

        Raises:
            ValueError: it is that of another problem.
        """
        super().load_state_dict(state)
        self._k, self._tightened, self._lipschitz = state["k"], state["tightened"], state["lipschitz"]
        self._accepted = None
        if state["accepted"] is not None:
            theta, x, z = (part.clone() for part in state["accepted"])
            self._accepted = (theta.to(self._theta), x.to(self._x), z.to(self._theta))
        self._accepted_loss = state["accepted_loss"]
        return self


class FixedAccuracy(BilevelDescent):
    """Descent with one accuracy for all steps and plain Armijo backtracking on inexact values, taken for exact.

    It ends, ``"stalled"``, where no trial step seems to decrease the loss.

    Args:
        lower: as in :class:`~regularized.scientific.inexact_bilevel.MAID`.
        upper: as there.
        theta: as there.
        x: as there.
        mu: as there.
        L: as there.
        eps: accuracy of both solves; default 0.1.
        step: as there.
        eta: as there.
        rho: as there.
        growth: as there.
        max_inner: as there.
        max_cg: as there.
        lower_solver: as there.
        deterministic: as there.

    Raises:
        ValueError: a setting is out of range.
        InnerToleranceNotReached: (in a step) ``max_inner`` iterations are not enough.

    Examples:
        >>> import torch
        >>> opt = FixedAccuracy(
        ...     lambda x, t: 0.5 * (x - t).square().sum(), lambda x: 0.5 * (x - 1.0).square().sum(),
        ...     torch.zeros(2), torch.zeros(2), mu=1.0, L=1.0, step=0.5, eps=1e-3
        ... )
        >>> [round(info.loss, 2) for info in opt.run(2)]
        [0.25, 0.05]
    """

    @allowed(eps=ABOVE_ZERO, step=ABOVE_ZERO, eta=INSIDE, rho=INSIDE, growth=at_least(1.0))
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
        step: float = 0.01,
        eta: float = 1e-4,
        rho: float = 0.5,
        growth: float = 10 / 9,
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
        self.eps = eps
        self.step_size: float = step
        self.eta = eta
        self.rho = rho
        self.growth = growth

    def step(self) -> BilevelStep:
        """Hypergradient, and Armijo's rule along it."""
        graph = self.accurate(self.eps)
        loss, at = self.inexact_gradient(graph, self.eps)
        z_norm = norm(at.z)
        status: Status = "stalled"
        taken = 0.0
        steps = (self.step_size * self.rho**i for i in range(_TRIALS))
        for a, theta, x, value, _ in self.trials(at.theta, at.z, steps, self.eps):
            if value - loss <= -self.eta * a * z_norm**2:
                self._theta, self._x = theta, x
                taken, loss, status = a, value, "descended"
                self.step_size = a * self.growth
                break
        return self.report(status, loss=loss, gradient_norm=z_norm, eps=self.eps, delta=self.eps, step_size=taken)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {**super().state_dict(), "step_size": self.step_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on from a state.

        Raises:
            ValueError: it is that of another problem.
        """
        super().load_state_dict(state)
        self.step_size = state["step_size"]
        return self
