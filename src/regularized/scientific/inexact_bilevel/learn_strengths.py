"""Learn the strengths of regularizers from a validation loss, by bilevel optimization.

    min over theta of  g(x*(theta)),   x*(theta) = argmin over x of  rest(x) + sum_i exp(theta_i) term_i(x)

The outer problem is descended by :class:`~regularized.scientific.inexact_bilevel.MAID`: gradients through the solution
of the training problem, as accurate as a descent direction needs them, and a line search on the validation loss.

====================  ===========================================================================================
in words              here
====================  ===========================================================================================
training objective    an :class:`~regularized.training.objective.Objective` on one full batch, solved to its minimum
strengths             coefficients of its terms, exp(theta): they stay positive, and equal steps are equal factors
mu, strong convexity  declared by terms (:class:`~regularized.training.terms.Ridge`) and measured at the solution
L, smoothness         measured on the way (:mod:`~regularized.scientific.inexact_bilevel.adaptive_fista`)
memory of a term      held still, or there would be no one objective: the targets of early-learning regularization
====================  ===========================================================================================
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regularized.mechanisms.conjugate_gradient import NotPositiveDefinite
from regularized.mechanisms.lanczos import extreme_eigenvalues
from regularized.scientific.inexact_bilevel.adaptive_fista import AdaptiveFista
from regularized.scientific.inexact_bilevel.descent import BilevelStep
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached
from regularized.scientific.inexact_bilevel.maid import MAID
from regularized.scientific.inexact_bilevel.problem import BilevelProblem
from regularized.scientific.inexact_bilevel.strength_problem import StrengthProblem
from regularized.training.objective import Objective
from regularized.training.sharded import check_whole

__all__ = ["LearntStrengths", "NotStronglyConvex", "StrengthStep", "learn_strengths"]

Curvature = Literal["declared", "estimated", "given"]

_SLACK = 0.99  # share of the declared modulus below which the smallest curvature contradicts it
_CAUTION = 0.9  # share of an estimated smallest curvature taken for mu: Lanczos sees it from above
_FIRST = 0.1  # first accuracies: distance of the inner solution, and share of the linear system's right-hand side
_NEAREST = 1e-4  # the start is brought to a tenth of its distance from the solution, but no nearer than this at first
_ROUNDING = 1e-9  # share of the largest curvature below which the smallest is none
_RELAX = 0.8  # of the largest curvature met in one solve: where the next one starts
_GROWTH = 1.5  # of the trial step after success: MAID's own 10 / 9 is for many variables, where a trial costs more
_FARTHEST = 3.0  # length of a trial step in log strengths: a factor of 20
_INNER = 10_000  # iterations in one solve at most


class NotStronglyConvex(ValueError):
    """The training objective does not curve upwards in every direction at its solution, so that has no derivative.

    Args:
        message: what was found, and how to mend it.
        result: what had been learnt until then; None where it failed at the start.
    """

    def __init__(self, message: str, result: "LearntStrengths | None" = None) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, slots=True)
class StrengthStep:
    """One outer step.

    Args:
        strengths: after it, by name.
        mu: constant of strong convexity there, in use.
        outer: validation loss, accuracies, step size, counted iterations and status, as MAID reports them.
    """

    strengths: dict[str, float]
    mu: float
    outer: BilevelStep


@dataclass(frozen=True)
class LearntStrengths:
    """What was learnt.

    Args:
        strengths: coefficient of each learnt term by name.
        parameters: all that was trained with them, float64: the model's by the names that they have there, those of
            terms as ``terms.NAME...``.
        validation_loss: at these parameters.
        start_loss: the same for the strengths that it began with.
        trace: the outer steps.
        status: why it ended. ``"stationary"``: no strength changes the validation loss by more than the tolerance a
            factor of e; ``"steps"`` or ``"budget"``: they are used up; ``"stagnated"``: rounding allows no more.
        curvature: where the constant of strong convexity comes from. ``"declared"`` by terms, and no measurement
            contradicts it; ``"estimated"`` at each solution, because the rest is not convex or nothing is declared;
            ``"given"``.
        smallest_curvature: of the training objective at the end, as measured (from above).
        iterations: gradients of the training objective and products with its second derivatives, everything included.
    """

    strengths: dict[str, float]
    parameters: dict[str, Tensor]
    validation_loss: float
    start_loss: float
    trace: tuple[StrengthStep, ...]
    status: str
    curvature: Curvature
    smallest_curvature: float
    iterations: int
    _problem: StrengthProblem = field(repr=False, compare=False)

    def apply_(self) -> None:
        """Write the strengths into objective and terms, and the parameters into the model (in its own dtype)."""
        self._problem.apply(self.strengths, self.parameters)


def learn_strengths(
    objective: Objective,
    terms: Sequence[str],
    validation: Any,
    *,
    model: nn.Module,
    data: Any,
    steps: int = 50,
    budget: int | None = None,
    tolerance: float = 1e-3,
    mu: float | None = None,
    deterministic: bool = True,
    apply: bool = False,
) -> LearntStrengths:
    """Set coefficients of an objective so that the model trained with them has the least validation loss.

    A step costs one training to a known distance from the minimum (warm-started: tens to hundreds of full-batch
    gradients), one linear solve with the Hessian, and one more training for each trial of the line search. However many
    strengths: that is where it beats a grid. All is computed in float64, on copies; the user's model, terms and
    objective stay as they are unless ``apply`` is set.

    *Not* for a deep network trained by mini-batches: the training objective must be one smooth function, strongly
    convex around its minimum. It is meant for linear and kernel models, fixed features, a last layer. A validation
    set can be overfitted by strengths as by parameters: with hundreds of them it must be large.

    Args:
        objective: named terms. Their present weights are where it starts, and must be numbers; those of ``terms``
            positive.
        terms: names of the terms whose strengths are learnt. For a strength per tensor see
            :meth:`~regularized.training.terms.Ridge.per_tensor`.
        validation: data in any form of ``data``, measured in eval mode by the other terms that look at data; or a
            function of the model that returns a differentiable scalar.
        model: the model, started from its present parameters. Dropout and BatchNorm must be in eval mode.
        data: the whole training set as one batch: ``(x, y)``, ``(x, y, index)``, a mapping, or a ``TensorData``.
        steps: outer steps at most; default 50.
        budget: gradients and Hessian products after which no further step begins; default no limit.
        tolerance: of the derivative of the validation loss by the logarithms of the strengths, at which it ends;
            default 0.001: a factor of e changes the loss by less than that. Warns where it ends at the start.
        mu: least curvature of the training objective near its minimum, if known. Default: what terms declare, unless
            measurement contradicts; otherwise measured.
        deterministic: False freezes one draw of dropout and noise and learns for it; default True refuses them.
        apply: write the result into objective, terms and model, as ``apply_()`` of the result does; default False.

    Returns:
        The strengths, the trained parameters, and what happened.

    Raises:
        ValueError: see :class:`~regularized.scientific.inexact_bilevel.strength_problem.StrengthProblem`; the
            validation loss does not depend on the parameters, or not on a strength; weights are in shards.
        TypeError: mini-batches.
        NotStronglyConvex: the training objective is not strongly convex at its solution.
        InnerToleranceNotReached: it could not be minimised as accurately as is needed.

    Examples:
        >>> from regularized.training import CrossEntropy, Ridge
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(80, 10)
        >>> y = (x[:, 0] + torch.randn(80) > 0).long()
        >>> objective = Objective({"task": CrossEntropy(), "ridge": Ridge(weight=1e-3)})
        >>> train, valid = (x[:40], y[:40]), (x[40:], y[40:])
        >>> result = learn_strengths(objective, ["ridge"], valid, model=nn.Linear(10, 2), data=train)
        >>> result.status, result.validation_loss < result.start_loss, 0.01 < result.strengths["ridge"] < 1.0
        ('stationary', True, True)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if mu is not None and not 0.0 < mu < math.inf:
        raise ValueError(f"mu must be a finite number > 0, or None; got {mu}")
    check_whole(model.parameters(), "the model")
    problem = StrengthProblem(objective, terms, validation, model=model, data=data, deterministic=deterministic)
    problem.check_terms()
    result = _Learner(problem, tolerance, mu).run(steps, budget)
    if apply:
        result.apply_()
    return result


class _Curvature:
    """mu as a function of theta, from what is given, declared and measured."""

    def __init__(self, problem: StrengthProblem, given: float | None) -> None:
        self._problem = problem
        self._given = given
        self.kind: Curvature = "declared" if given is None else "given"
        self.smallest = math.nan
        self._at: Tensor | None = None

    def mu(self, theta: Tensor) -> float:
        if self.kind == "given" and self._given is not None:
            return self._given
        if self.kind == "estimated" and self._at is not None:
            # Curvature is at least that of before times the smallest factor, where all terms are convex.
            return _CAUTION * self.smallest * min(1.0, math.exp(float((theta - self._at).min())))
        return self.declared(theta)

    def declared(self, theta: Tensor) -> float:
        return self._problem.strong_convexity(self._problem.named(theta))

    def measure(self, problem: BilevelProblem, x: Tensor, theta: Tensor) -> None:
        """Smallest curvature at a solution, from a fixed start; flat vectors.

        Raises:
            NotStronglyConvex: it is not positive.
            ValueError: it is below the mu that was given.
        """
        start = torch.randn(x.numel(), generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
        self.smallest, largest = extreme_eigenvalues(problem.linearise(x, theta).hessian, start)
        if not self.smallest > _ROUNDING * abs(largest):
            raise NotStronglyConvex(self.advice(theta, f"a curvature of {self.smallest:.3g} was measured"))
        if self._given is not None:
            if self.smallest < _SLACK * self._given:
                raise ValueError(
                    f"mu = {self._given:.3g} was given, but a curvature of {self.smallest:.3g} was measured at the "
                    "solution; give at most that, or leave mu out"
                )
        elif self.kind == "estimated" or self.smallest < _SLACK * self.declared(theta) or not self.declared(theta) > 0:
            self.kind, self._at = "estimated", theta.clone()

    def advice(self, theta: Tensor, found: str) -> str:
        strengths = ", ".join(f"{name} = {value:.3g}" for name, value in self._problem.named(theta).items())
        convex = self._problem.convex_terms()
        raising = f"Raise the weight of {convex}" if convex else "Add Ridge(weight=1e-3) to the objective"
        return (
            f"with {strengths} the training objective is not strongly convex at its solution: {found}. {raising}, or "
            "lower those of terms that are not convex"
        )


class _Learner:
    """MAID on a problem of strengths, with its constants."""

    def __init__(self, problem: StrengthProblem, tolerance: float, mu: float | None) -> None:
        self._problem = problem
        self._curvature = _Curvature(problem, mu)
        theta = problem.theta()
        self._earlier = 0  # iterations that MAID does not count
        probe = BilevelProblem(problem.lower, problem.upper, problem.start, theta)
        flat = probe.x_shape.flatten(problem.start)
        slope = problem.validation_slope()
        if mu is None and not self._curvature.declared(theta) > 0.0:
            self._curvature.measure(probe, flat, theta)
            self._earlier += probe.inner_gradients + probe.products
        first = self._curvature.mu(theta)
        self._solver = AdaptiveFista()
        self._L = first
        # A start at zero may be near enough to the solution to be left as it is, where a ridge has no derivative.
        distance = float(probe.inner_gradient(flat, theta).norm()) / first
        self._earlier += 1
        self._maid = MAID(
            problem.lower,
            problem.upper,
            theta,
            problem.start,
            mu=self._curvature.mu,
            L=lambda theta: max(self._L, self._curvature.mu(theta)),
            eps=min(_FIRST, max(0.1 * distance, _NEAREST)),
            delta=_FIRST * slope,
            growth=_GROWTH,
            convex=False,
            tolerance=tolerance,
            max_inner=_INNER,
            max_cg=_INNER,
            lower_solver=self._solver,
        )

    def run(self, steps: int, budget: int | None) -> LearntStrengths:
        """Outer steps until one of the ends is reached."""
        maid = self._maid
        start_loss = self._start()
        trace: list[StrengthStep] = []
        status = "steps"
        try:
            while len(trace) < steps:
                if budget is not None and self._spent() >= budget:
                    status = "budget"
                    break
                done = maid.step()
                if done.status == "descended":  # the solve that was accepted came last
                    self._L = _RELAX * self._solver.L
                    # Far outside the training problem may be hard to solve, only to be told that it is too far.
                    maid.step_size = min(maid.step_size, _FARTHEST / done.gradient_norm)
                if self._curvature.kind == "estimated" and done.status == "descended":
                    self._measure()
                trace.append(StrengthStep(self._problem.named(maid.theta), self._curvature.mu(maid.theta), done))
                if done.status in ("stationary", "stagnated"):
                    status = done.status
                    break
            self._measure()
        except NotPositiveDefinite as error:
            found = f"a direction of curvature {error.curvature:.3g} was met"
            raise NotStronglyConvex(
                self._curvature.advice(maid.theta, found), self._result(trace, "not strongly convex", start_loss)
            ) from error
        except NotStronglyConvex as error:
            raise NotStronglyConvex(str(error), self._result(trace, "not strongly convex", start_loss)) from error
        if status == "stationary" and len(trace) == 1:
            warnings.warn(
                "the strengths stayed where they began: a factor of e in one of them changes the validation loss by "
                f"less than tolerance={maid.tolerance:g} there. Far from an optimum the loss can be as flat as near "
                f"it: if {maid.tolerance:g} is much beside what the loss may still fall by, give a smaller tolerance, "
                "such as 1e-6, or other weights to begin with",
                UserWarning,
                stacklevel=3,
            )
        return self._result(trace, status, start_loss)

    def _start(self) -> float:
        """The first solution: is it one that can be differentiated, and by every strength? Scales the first step."""
        maid, theta = self._maid, self._maid.theta
        try:
            try:
                graph = maid.accurate(maid.eps)
                if math.isfinite(self._solver.L):  # there was something to solve
                    self._L = _RELAX * self._solver.L
            except InnerToleranceNotReached:
                self._measure()  # because there is no minimum?
                raise
            self._measure()
            loss, at = maid.inexact_gradient(graph, maid.delta)
        except NotPositiveDefinite as error:
            found = f"a direction of curvature {error.curvature:.3g} was met"
            raise NotStronglyConvex(self._curvature.advice(theta, found)) from error
        if idle := [name for name, slope in zip(self._problem.names, at.z.tolist(), strict=True) if slope == 0.0]:
            raise ValueError(
                f"the validation loss does not depend on the strengths of {idle}: nothing that these terms act on "
                "enters it. Leave them out, or validate with something that they change"
            )
        # The first trial changes the strengths by a factor of e in all; MAID goes on from what it finds.
        maid.step_size = 1.0 / float(at.z.norm())
        return loss

    def _measure(self) -> None:
        problem = self._maid.problem
        self._curvature.measure(problem, problem.x_shape.flatten(self._maid.x), self._maid.theta)

    def _spent(self) -> int:
        return self._earlier + self._maid.iterations

    def _result(self, trace: Sequence[StrengthStep], status: str, start_loss: float) -> LearntStrengths:
        problem, maid = self._problem, self._maid
        x = maid.x
        with torch.no_grad():
            loss = float(problem.upper(x))
        return LearntStrengths(
            strengths=problem.named(maid.theta),
            parameters=problem.public(x),
            validation_loss=loss,
            start_loss=start_loss,
            trace=tuple(trace),
            status=status,
            curvature=self._curvature.kind,
            smallest_curvature=self._curvature.smallest,
            iterations=self._spent(),
            _problem=problem,
        )
