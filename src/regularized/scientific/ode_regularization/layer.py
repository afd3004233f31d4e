"""Regularising the solver's own heuristics: for neural differential equations that need ever more evaluations.

An adaptive solver computes a local error for each step, and nearly for free an estimate of stiffness. Added to the
loss, they teach dynamics that the solver integrates in few steps, without higher derivatives.

    Pal, Ma, Shah, Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing
    Internal Solver Heuristics", ICML 2021, arXiv 2105.03918. Official code: avik-pal/RegNeuralDE.jl at bb252b5 (MIT).

============  ====================  ===========================================================================
paper         here                  meaning
============  ====================  ===========================================================================
E_j abs h_j   ``"error"``           scaled local error of step j times its length
S_j           ``"stiffness"``       estimate of stiffness over the size of the stability region
R_ES          ``"both"``            error + 0.1 stiffness
lambda        ``weight``            coefficient, falling exponentially over the epochs
============  ====================  ===========================================================================

Paper and code differ: the paper sums over the steps, the code takes the mean (of errors), the largest (of stiffness for
ODEs) or the sum (its spiral). ``reduction`` offers all three, by default the mean. The paper speaks of the local error;
the code, and we, divide it by the tolerance. The code's mean may hold one more term from before the first step; ours
does not.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from regularized.scientific.ode_regularization.ode_solver import Field, check_pair, check_times, odeint, odeint_on_grid
from regularized.scientific.ode_regularization.sde_solver import sdeint, sdeint_on_grid
from regularized.scientific.ode_regularization.sde_tableaus import STOCHASTIC
from regularized.scientific.ode_regularization.solver_statistics import Norm, Solution, SolverStatistics
from regularized.training.progress import Coefficient, Progress, Schedule
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["NeuralODE", "NeuralSDE", "SolverRegularization", "exponential_decay", "solver_penalty"]

Kind: TypeAlias = Literal["error", "stiffness", "both"]
Reduction: TypeAlias = Literal["mean", "sum", "max"]
STIFFNESS_SHARE = 0.1  # of the combined regulariser, from the official code


def solver_penalty(statistics: SolverStatistics, *, kind: Kind = "error", reduction: Reduction = "mean") -> Tensor:
    """The regulariser of one solve: R_E, R_S or R_ES.

    Errors are relative to the tolerance, so an accepted step has at most 1, and the mean is at most the mean step: this
    is why coefficients of 10 to 100 are usual.

    Args:
        statistics: of a solve with gradients.
        kind: ``"error"`` (default), ``"stiffness"`` or ``"both"``.
        reduction: over the steps: ``"mean"`` (default), ``"sum"`` or ``"max"``.

    Returns:
        Scalar; the mean over rows where the solve had ``norm="sample"``.

    Raises:
        ValueError: unknown kind or reduction, or stiffness of a method that has no estimate.
        RuntimeError: the statistics have no graph, or were already back-propagated.

    Examples:
        >>> rate = torch.tensor(-2.0, requires_grad=True)
        >>> solution = odeint(lambda t, u: rate * u, torch.ones(3, 1), [0.0, 1.0])
        >>> penalty = solver_penalty(solution.statistics, kind="stiffness")
        >>> round(float(penalty) * 3.5068, 3)
        2.0
    """
    check_kind(kind, reduction)
    if not statistics.recorded:
        raise RuntimeError(
            "these solver statistics carry no graph: they come from eval() mode or from a solve without gradients. "
            "Call the layer in train() mode, with gradients switched on, before the penalty"
        )
    if statistics.spent:
        raise RuntimeError(
            "these solver statistics were back-propagated already; call the layer on the new batch before its penalty"
        )
    values = torch.zeros(())
    if kind in ("error", "both"):
        values = statistics.errors_times_steps
    if kind in ("stiffness", "both"):
        stiffness = statistics.stiffness / cast(float, statistics.stability_size)
        values = stiffness if kind == "stiffness" else values + STIFFNESS_SHARE * stiffness
    if reduction == "max":
        penalty = values.amax(dim=0).mean()
    else:
        penalty = (values.mean(dim=0) if reduction == "mean" else values.sum(dim=0)).mean()
    if penalty.requires_grad:
        penalty.register_hook(lambda _gradient: setattr(statistics, "spent", True))
    return penalty


def check_kind(kind: str, reduction: str) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: with what is allowed.
    """
    if kind not in ("error", "stiffness", "both"):
        raise ValueError(f'kind must be "error", "stiffness" or "both", got {kind!r}')
    if reduction not in ("mean", "sum", "max"):
        raise ValueError(f'reduction must be "mean", "sum" or "max", got {reduction!r}')


@dataclass(frozen=True, slots=True)
class _ExponentialDecay:
    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        share = progress.epoch / progress.total_epochs if progress.total_epochs else 0.0
        value: float = self.start * (self.end / self.start) ** min(share, 1.0)
        return value


def exponential_decay(start: float, end: float) -> Schedule:
    """The paper's annealing: ``start exp(-k epoch)``, which would be ``end`` after the last epoch.

    Args:
        start: coefficient in the first epoch, > 0; the paper's MNIST has 100.
        end: > 0; there 10.

    Raises:
        ValueError: a value is not positive.

    Examples:
        >>> decay = exponential_decay(100.0, 10.0)
        >>> [round(decay(Progress(0, 1, epoch=e, total_epochs=4)), 2) for e in (0, 2, 4)]
        [100.0, 31.62, 10.0]
    """
    if not (start > 0.0 and end > 0.0):
        raise ValueError(f"start and end of an exponential decay must be > 0, got {start} and {end}")
    return _ExponentialDecay(start, end)


class _Layer(nn.Module):
    """What both layers share: time span, tolerances, statistics of the last call."""

    def __init__(
        self,
        span: tuple[float, float],
        method: str,
        rtol: float,
        atol: float,
        norm: Norm,
        steps: int | None,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.span = tuple(check_times(span))
        if len(self.span) != 2:
            raise ValueError(f"span must hold the first and the last time, got {span}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, or None for adaptive steps; got {steps}")
        if norm not in ("batch", "sample"):
            raise ValueError(f'norm must be "batch" or "sample", got {norm!r}')
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        self.method, self.rtol, self.atol, self.norm, self.steps = method, rtol, atol, norm, steps
        self.max_steps = max_steps
        self._statistics: SolverStatistics | None = None

    @property
    def statistics(self) -> SolverStatistics:
        """Of the last call.

        Raises:
            RuntimeError: the layer was not called yet.
        """
        if self._statistics is None:
            raise RuntimeError(f"this {type(self).__name__} was not called yet, so there are no solver statistics")
        return self._statistics

    def _finish(self, solution: Solution) -> Tensor:
        self._statistics = solution.statistics
        return solution.states[-1]

    def _grid(self) -> list[float]:
        start, end = self.span
        steps = self.steps or 1
        return [start + (end - start) * n / steps for n in range(steps)] + [end]

    def __getstate__(self) -> dict[str, Any]:
        # The graph of the last solve can neither be copied nor saved, and belongs to nobody else.
        return {**self.__dict__, "_statistics": None}

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"span={self.span}, method={self.method!r}, rtol={self.rtol}, atol={self.atol}, norm={self.norm!r}, "
            f"steps={self.steps}, max_steps={self.max_steps}"
        )


class NeuralODE(_Layer):
    """A layer whose output is the solution of ``u' = f(t, u)`` at the end of a time span.

    Gradients go through the accepted steps. In ``eval()`` mode the same solver runs without a graph for its errors.
    With adaptive steps the whole batch shares them, so that the result depends on the batch within the tolerance, and
    the errors beyond it; and the first step and each attempt read one number from the device.

    Args:
        f: module or function called with t, a tensor without dimensions, and u (B, ...).
        span: first and last time; default (0, 1), as in the paper.
        method: ``"tsit5"`` (default, the paper's), ``"dopri5"`` or ``"bosh3"``.
        rtol: relative tolerance; default 1e-6. Regularisation needs a tight one (the paper has 1.4e-8 on MNIST): with a
            loose one there are few steps to save.
        atol: absolute tolerance; default 1e-6.
        norm: ``"batch"`` (default) or ``"sample"``.
        steps: that many equal steps instead of adaptive ones; default None. Nothing is then read from the device.
        max_steps: attempts after which a call gives up; default 1,000, so that dynamics that blew up in training end in
            an error before their graph fills the memory.
        backprop: ``"direct"`` (default) keeps the whole graph, ``"checkpoint"`` the states alone and computes each step
            again in the backward pass.

    Attributes:
        statistics: of the last call.

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> class Field(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(3, 3)
        ...     def forward(self, t, u):
        ...         return torch.tanh(self.linear(u))
        >>> layer = NeuralODE(Field())
        >>> u = layer(torch.randn(8, 3))
        >>> loss = u.square().mean() + 10.0 * solver_penalty(layer.statistics)
        >>> loss.backward()
    """

    def __init__(
        self,
        f: Field,
        *,
        span: tuple[float, float] = (0.0, 1.0),
        method: str = "tsit5",
        rtol: float = 1e-6,
        atol: float = 1e-6,
        norm: Norm = "batch",
        steps: int | None = None,
        max_steps: int = 1000,
        backprop: Literal["direct", "checkpoint"] = "direct",
    ) -> None:
        super().__init__(span, method, rtol, atol, norm, steps, max_steps)
        check_pair(method)
        if backprop not in ("direct", "checkpoint"):
            raise ValueError(
                f'backprop must be "direct" or "checkpoint", got {backprop!r}; solver statistics are not '
                "differentiable through the continuous adjoint, and checkpointing saves its memory with exact gradients"
            )
        self.f = f
        self.backprop = backprop

    def forward(self, u: Tensor) -> Tensor:
        """State at the end of the span, from the state (B, ...) at its start."""
        recompute = self.backprop == "checkpoint"
        if self.steps is None:
            solution = odeint(
                self.f,
                u,
                self.span,
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                norm=self.norm,
                max_steps=self.max_steps,
                recompute=recompute,
                record=self.training,
            )
        else:
            solution = odeint_on_grid(
                self.f,
                u,
                self._grid(),
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                norm=self.norm,
                recompute=recompute,
                record=self.training,
            )
        return self._finish(solution)


class NeuralSDE(_Layer):
    """A layer whose output is one path of ``du = drift dt + diffusion dW`` at the end of a time span.

    Args:
        drift: module or function called with t and u (B, ...).
        diffusion: likewise, one coefficient for each entry of u: diagonal Ito noise.
        span: first and last time; default (0, 1).
        method: ``"sosri"`` (default, the paper's for errors) or ``"sosri2"``, which estimates stiffness too.
        rtol: relative tolerance; default 0.14, the paper's on MNIST.
        atol: absolute tolerance; default 0.14.
        norm: ``"batch"`` (default) or ``"sample"``.
        steps: that many equal steps instead of adaptive ones; default None.
        max_steps: attempts after which a call gives up; default 1,000, so that dynamics that blew up in training end in
            an error before their graph fills the memory.

    Attributes:
        statistics: of the last call.

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> layer = NeuralSDE(lambda t, u: -u, lambda t, u: 0.1 * u)
        >>> layer(torch.ones(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        drift: Field,
        diffusion: Field,
        *,
        span: tuple[float, float] = (0.0, 1.0),
        method: str = "sosri",
        rtol: float = 0.14,
        atol: float = 0.14,
        norm: Norm = "batch",
        steps: int | None = None,
        max_steps: int = 1000,
    ) -> None:
        super().__init__(span, method, rtol, atol, norm, steps, max_steps)
        if method not in STOCHASTIC:
            raise ValueError(f"method must be one of {', '.join(STOCHASTIC)}, got {method!r}")
        self.drift, self.diffusion = drift, diffusion

    def forward(self, u: Tensor) -> Tensor:
        """State at the end of the span; the noise comes from torch's global generator."""
        if self.steps is None:
            solution = sdeint(
                self.drift,
                self.diffusion,
                u,
                self.span,
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                norm=self.norm,
                max_steps=self.max_steps,
                record=self.training,
            )
        else:
            solution = sdeint_on_grid(
                self.drift,
                self.diffusion,
                u,
                self._grid(),
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                norm=self.norm,
                record=self.training,
            )
        return self._finish(solution)


class SolverRegularization(Term):
    """The penalty of all :class:`NeuralODE` and :class:`NeuralSDE` layers of a model, as a term of the loss.

    The errors are there anyway; their gradient costs some arithmetic on the state in each step, little beside a field
    that is not small. Not for loose tolerances or models where a solve takes a few steps only; and a coefficient ten
    times too large costs accuracy and can make training unsteady: watch both.

    Args:
        kind: ``"error"`` (default), ``"stiffness"`` or ``"both"``.
        reduction: over the steps of a layer: ``"mean"`` (default, official code), ``"sum"`` or ``"max"`` (official code
            for stiffness of ODEs).
        weight: coefficient, a number or a schedule. Default ``exponential_decay(100, 10)``, the paper's for errors on
            MNIST; it has 0.1 for stiffness and 10 for both.

    Raises:
        ValueError: unknown kind or reduction; the model has no such layer.
        RuntimeError: a layer is in ``eval()`` mode while the term is not.

    Examples:
        >>> from regularized.training.step import Batch
        >>> model = NeuralODE(lambda t, u: u.tanh(), rtol=1e-5, atol=1e-5)
        >>> step = Step(model, Batch.of(torch.randn(4, 2).requires_grad_()), Progress(0, 1))
        >>> bool(SolverRegularization()(step) > 0)
        True
    """

    def __init__(
        self, *, kind: Kind = "error", reduction: Reduction = "mean", weight: Coefficient | None = None
    ) -> None:
        super().__init__(weight=exponential_decay(100.0, 10.0) if weight is None else weight)
        check_kind(kind, reduction)
        self.kind: Kind = kind
        self.reduction: Reduction = reduction

    def forward(self, step: Step) -> Tensor:
        """Batch size times the sum of the layers' penalties; 0 in ``eval()`` mode."""
        output = step.output  # the solves
        layers = [module for module in step.model.modules() if isinstance(module, _Layer)]
        if not layers:
            raise ValueError(
                f"SolverRegularization found no NeuralODE or NeuralSDE in {type(step.model).__name__}; it needs one"
            )
        if not self.training:
            first = output if isinstance(output, Tensor) else layers[0].statistics.errors
            return first.new_zeros(())
        total = [solver_penalty(layer.statistics, kind=self.kind, reduction=self.reduction) for layer in layers]
        return torch.stack(total).sum() * step.batch.size
