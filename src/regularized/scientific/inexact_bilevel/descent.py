"""What descent methods for bilevel problems share: state, inner solves and hypergradients to an accuracy, counting."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.conjugate_gradient import conjugate_gradient
from regularized.mechanisms.ranges import Interval, above
from regularized.scientific.inexact_bilevel.bound import Inexact
from regularized.scientific.inexact_bilevel.lower_solvers import (
    InnerToleranceNotReached,
    LowerSolver,
    check_constants,
    fista,
)
from regularized.scientific.inexact_bilevel.problem import BilevelProblem, Linearised, Lower, Tree, Upper, norm

__all__ = ["BilevelDescent", "BilevelStep", "OfTheta", "Status"]

OfTheta: TypeAlias = float | Callable[[Any], float | Tensor]
Status: TypeAlias = Literal["descended", "tightened", "rejected", "stalled", "stationary", "stagnated"]

ABOVE_ZERO = above(0.0)
INSIDE = Interval(0.0, 1.0, "()", words="between 0 and 1")


@dataclass(frozen=True, slots=True)
class BilevelStep:
    """What one outer step did.

    Args:
        loss: g at the inner solution, after the step.
        loss_error: how far it may be from the exact upper loss; None where the method does not know.
        gradient_norm: ``||z||`` of the hypergradient that was used.
        bound: omega, on its error; None where the method does not know.
        eps: accuracy of the inner solutions of this step.
        delta: accuracy of the linear solve of this step.
        step_size: the one that was taken, 0 where none was.
        inner_iterations: gradients of the lower objective, in all steps so far.
        cg_iterations: products with second derivatives (of CG, of the hypergradient, and of a bound's estimates), in
            all steps so far.
        status: ``"descended"``; ``"tightened"``: accuracy hid the decrease, the next step goes on with more of it;
            ``"rejected"``: HOAG went back; ``"stalled"``: a fixed accuracy found no decrease; ``"stationary"``: the
            hypergradient and its error are below the tolerance; ``"stagnated"``: rounding allows no more accuracy.
    """

    loss: float
    loss_error: float | None
    gradient_norm: float
    bound: float | None
    eps: float
    delta: float
    step_size: float
    inner_iterations: int
    cg_iterations: int
    status: Status

    @property
    def iterations(self) -> int:
        """Inner and CG iterations so far: what budgets count."""
        return self.inner_iterations + self.cg_iterations


class BilevelDescent:
    """State and solves of a method that descends on theta.

    Args:
        lower: ``lower(x, theta)``, a scalar; twice differentiable, strongly convex and smooth in x. No mini-batches.
        upper: ``upper(x)``, or ``upper(x, theta)`` where theta enters directly too.
        theta: start of the outer variable: a tensor, or tuples, lists and dictionaries of tensors.
        x: start of the inner variable, likewise.
        mu: constant of strong convexity of ``lower`` in x, > 0: a number, or a function of theta.
        L: Lipschitz constant of its gradient, likewise.
        max_inner: gradients in an inner solve at most; default 2000.
        max_cg: CG iterations at most; default 2000.
        lower_solver: of the inner problem; default :func:`~regularized.scientific.inexact_bilevel.lower_solvers.fista`.
        deterministic: False says that you know that an objective returns something else on every call, and want to go
            on all the same; default True, which looks.

    Raises:
        ValueError: mu or L is missing or out of range, an objective is not deterministic, or theta and x are no trees
            of floating tensors.
    """

    def __init__(
        self,
        lower: Lower,
        upper: Upper,
        theta: Tree,
        x: Tree,
        *,
        mu: OfTheta | None,
        L: OfTheta | None,
        max_inner: int = 2000,
        max_cg: int = 2000,
        lower_solver: LowerSolver = fista,
        deterministic: bool = True,
    ) -> None:
        for name, constant in (("mu", mu), ("L", L)):
            if constant is None:
                meaning = (
                    "the least curvature of lower in x, for example the smallest ridge weight"
                    if name == "mu"
                    else "the largest curvature of lower in x"
                )
                raise ValueError(f"{name} is missing: give {meaning}, as a number or a function of theta")
        if min(max_inner, max_cg) < 1:
            raise ValueError(f"max_inner and max_cg must be at least 1, got {max_inner} and {max_cg}")
        self.problem: BilevelProblem = BilevelProblem(lower, upper, x, theta)
        self._mu = mu
        self._L = L
        self.max_inner = max_inner
        self.max_cg = max_cg
        self.lower_solver = lower_solver
        self._theta = self.problem.theta_shape.flatten(theta)
        self._x = self.problem.x_shape.flatten(x)
        self._q: Tensor | None = None
        self._budget: int | None = None
        if deterministic:
            self._check_deterministic()
        self.constants(self._theta)  # refuses mu and L before anything is computed with them

    @property
    def theta(self) -> Tree:
        """The outer variable now, like the one that was given; a copy."""
        return self.problem.theta_shape.unflatten(self._theta.clone())

    @property
    def x(self) -> Tree:
        """The inner solution at theta as it is known now; a copy."""
        return self.problem.x_shape.unflatten(self._x.clone())

    @property
    def accepted_theta(self) -> Tree:
        """The theta whose loss the last step reported; a copy."""
        return self.theta

    @property
    def iterations(self) -> int:
        """Gradients of the lower objective and products with second derivatives so far."""
        return self.problem.inner_gradients + self.problem.products

    @property
    def exhausted(self) -> bool:
        """Whether the budget of the present run is used up."""
        return self._budget is not None and self.iterations >= self._budget

    def step(self) -> BilevelStep:
        """One outer step."""
        raise NotImplementedError

    def run(self, steps: int | None = None, *, budget: int | None = None) -> list[BilevelStep]:
        """Steps until a number of them is made, the budget is used up, or there is nowhere to go.

        Args:
            steps: how many at most.
            budget: inner and CG iterations of all steps of this object; the last solve may exceed it.

        Returns:
            What the steps did.

        Raises:
            ValueError: neither is given.
        """
        if steps is None and budget is None:
            raise ValueError("give steps, budget or both")
        log: list[BilevelStep] = []
        self._budget = budget
        try:
            while not self.exhausted and (steps is None or len(log) < steps):
                log.append(self.step())
                if log[-1].status in ("stationary", "stagnated", "stalled"):
                    break
        finally:
            self._budget = None
        return log

    # -- what steps are made of; vectors are flat -------------------------------------------------

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """mu and L at theta.

        Raises:
            ValueError: one is out of range.
        """
        with torch.no_grad():
            tree = self.problem.theta_shape.unflatten(theta)
            mu, L = (float(c(tree) if callable(c) else c) for c in (self._mu, self._L) if c is not None)
        check_constants(mu, L, 0.0)
        return mu, L

    def solvable(self, theta: Tensor) -> bool:
        """Whether there is a lower problem at a trial theta that is worth starting on."""
        try:
            mu, L = self.constants(theta)
        except ValueError:  # mu or L is out of range so far out
            return False
        # In the worst case sqrt(L / mu) iterations contract by no more than e.
        return mu * float(self.max_inner) ** 2 >= L

    def solve(self, theta: Tensor, eps: float) -> Tensor:
        """The inner problem at theta to a distance of eps, from the present x.

        Raises:
            InnerToleranceNotReached: there is no such point within ``max_inner`` iterations.
        """
        mu, L = self.constants(theta)
        solution = self.lower_solver(
            lambda x: self.problem.inner_gradient(x, theta),
            self._x,
            mu=mu,
            L=L,
            eps=eps,
            max_iterations=self.max_inner,
        )
        found: Tensor = solution.x
        return found

    def trials(
        self, theta: Tensor, z: Tensor, steps: Iterable[float], eps: float
    ) -> Iterator[tuple[float, Tensor, Tensor, float, Tensor]]:
        """Points ``theta - a z`` of a line search, for each step size a where the lower problem can be solved to eps.

        Yields:
            a, theta and x there, g, and its gradient in x. Nothing is computed before it is asked for.
        """
        for a in steps:
            moved = theta - a * z
            if not self.solvable(moved):
                continue
            try:
                x = self.solve(moved, eps)
            except InnerToleranceNotReached:
                continue  # too far: so badly conditioned there that it could not be solved
            value, by_x, _ = self.problem.upper_gradient(x, moved)
            yield a, moved, x, float(value), by_x

    def accurate(self, eps: float, graph: Linearised | None = None) -> Linearised:
        """Bring x to a distance of eps and return the gradient's graph there; solves only where x is farther."""
        mu, _ = self.constants(self._theta)
        graph = graph or self.problem.linearise(self._x, self._theta)
        if not norm(graph.gradient) <= mu * eps:
            self._x = self.solve(self._theta, eps)
            graph = self.problem.linearise(self._x, self._theta)
        return graph

    def inexact_gradient(self, graph: Linearised, delta: float) -> tuple[float, Inexact]:
        """g, and the hypergradient at x by a linear solve to delta, from the last q.

        Raises:
            RuntimeError: CG did not get there.
            ValueError: B is 0.
            NotPositiveDefinite: the lower problem is not strongly convex at x.
        """
        loss, by_x, direct = self.problem.upper_gradient(self._x, self._theta)
        solved = conjugate_gradient(graph.hessian, by_x, tol=delta, x0=self._q, max_iterations=self.max_cg)
        if not solved.converged:
            raise RuntimeError(
                f"conjugate gradients reached a residual of {solved.residual_norm:.3g} in {solved.iterations} "
                f"iterations, not delta = {delta:.3g}; raise max_cg, or add ridge to the lower objective"
            )
        self._q = solved.solution
        product, transposed = graph.both(self._q)
        if not transposed.any() and self._q.any():
            graph.check_connected()
        mu, _ = self.constants(self._theta)
        inexact = Inexact(self._x, self._theta, graph, self._q, product, transposed, by_x, direct, mu)
        return float(loss), inexact

    def report(
        self,
        status: Status,
        *,
        loss: float,
        gradient_norm: float,
        eps: float,
        delta: float,
        step_size: float,
        loss_error: float | None = None,
        bound: float | None = None,
    ) -> BilevelStep:
        """What a step did, with what all steps so far have cost."""
        return BilevelStep(
            loss=loss,
            loss_error=loss_error,
            gradient_norm=gradient_norm,
            bound=bound,
            eps=eps,
            delta=delta,
            step_size=step_size,
            inner_iterations=self.problem.inner_gradients,
            cg_iterations=self.problem.products,
            status=status,
        )

    def _check_deterministic(self) -> None:
        with torch.no_grad():
            for name, value in (("lower", self.problem.lower_value), ("upper", self.problem.upper_value)):
                first, second = (float(value(self._x, self._theta)) for _ in range(2))
                if first != second and not (math.isnan(first) and math.isnan(second)):
                    raise ValueError(
                        f"{name} returned {first:.6g} and then {second:.6g} for the same arguments: mini-batches, "
                        "dropout and noise make accuracies and line search meaningless. Use all data and eval(), or "
                        "say deterministic=False to go on all the same"
                    )

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors, numbers, and dictionaries of them."""
        return {
            "theta": self._theta.clone(),
            "x": self._x.clone(),
            "q": None if self._q is None else self._q.clone(),
            "inner_gradients": self.problem.inner_gradients,
            "products": self.problem.products,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on from a state.

        Raises:
            ValueError: it is that of another problem.
        """
        for name, own in (("theta", self._theta), ("x", self._x)):
            if state[name].shape != own.shape:
                raise ValueError(
                    f"the state's {name} has {state[name].numel()} entries, this problem's has {own.numel()}"
                )
        self._theta, self._x = (state[name].to(own).clone() for name, own in (("theta", self._theta), ("x", self._x)))
        self._q = None if state["q"] is None else state["q"].to(self._x).clone()
        self.problem.inner_gradients, self.problem.products = state["inner_gradients"], state["products"]
        return self
