"""What an adaptive solve knows about its steps, with the graph of it: errors, lengths, estimates of stiffness.

The estimate of stiffness: Hairer & Wanner, "Solving Ordinary Differential Equations II", IV.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice

__all__ = ["Solution", "SolverStatistics"]

Norm: TypeAlias = Literal["batch", "sample"]
NORM = Choice("batch", "sample")
# Shapes: B samples, N accepted steps, T times that were asked for; the state is (B, ...) or anything else.


class LastStages(NamedTuple):
    """The last two stages of a step, both at its end: what an estimate of stiffness is made of.

    Attributes:
        k: derivative in the last stage.
        k_before: in the one before.
        g: state at which k was taken.
        g_before: likewise.
    """

    k: Tensor
    k_before: Tensor
    g: Tensor
    g_before: Tensor


class SolverStatistics:
    """What a solve knows about its accepted steps.

    Attributes:
        step_sizes: N lengths of the steps, positive.
        evaluations: calls of f, those of rejected attempts and of the first step size included.
        rejected: attempts that were not accepted.
        recorded: whether errors and stiffness carry the graph of the solve.
        stability_size: what stiffness is divided by in the penalty; None where the method has no estimate.

    Examples:
        >>> from regularized.scientific.ode_regularization.ode_solver import odeint
        >>> solution = odeint(lambda t, u: -3.0 * u, torch.ones(2, 1), [0.0, 1.0])
        >>> statistics = solution.statistics
        >>> len(statistics.step_sizes) == len(statistics.errors) == len(statistics.stiffness)
        True
        >>> round(float(statistics.stiffness[0]), 3)
        3.0
    """

    def __init__(self, *, method: str, stability_size: float | None, norm: Norm, recorded: bool) -> None:
        self.step_sizes: list[float] = []
        self.evaluations = 0
        self.rejected = 0
        self.recorded = recorded
        self.stability_size = stability_size
        self.spent = False
        self._method = method
        self._norm: Norm = norm
        self._errors: list[Tensor] = []
        self._last_stages: list[LastStages] = []
        self._stiffness: Tensor | None = None

    def accept(self, size: float, error: Tensor, last: LastStages) -> None:
        """Note an accepted step."""
        self.step_sizes.append(size)
        self._errors.append(error)
        if self.recorded:
            self._last_stages.append(last)

    def only(self, number: int) -> "SolverStatistics":
        """One of the steps, with its graph and no evaluations."""
        one = SolverStatistics(
            method=self._method, stability_size=self.stability_size, norm=self._norm, recorded=self.recorded
        )
        one.step_sizes, one._errors = [self.step_sizes[number]], [self._errors[number]]
        one._last_stages = self._last_stages[number:][:1]
        return one

    @property
    def errors(self) -> Tensor:
        """(N,) scaled local errors EEst; (N, B) with ``norm="sample"``."""
        return torch.stack(self._errors)

    @property
    def errors_times_steps(self) -> Tensor:
        """(N,) or (N, B) products of scaled error and length of the step, what the error regulariser is made of."""
        return torch.stack(torch._foreach_mul(self._errors, self.step_sizes))

    @property
    def stiffness(self) -> Tensor:
        """(N,) or (N, B) estimates of the largest eigenvalue's magnitude; 0 where two stages coincide.

        Raises:
            ValueError: the method has no such estimate.
        """
        if self.stability_size is None:
            raise ValueError(
                f"{self._method} gives no estimate of stiffness, which needs two stages at the end of the step; use "
                "tsit5 or dopri5, or sosri2 for stochastic equations"
            )
        if not self.recorded:
            raise ValueError("stiffness needs the stages of a solve with record=True and gradients switched on")
        if self._stiffness is None:
            self._stiffness = torch.stack([largest_eigenvalue(last, norm=self._norm) for last in self._last_stages])
        return self._stiffness


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solve returns.

    Args:
        states: (T, ...) states at the times that were asked for, the start included.
        statistics: of the accepted steps.
    """

    states: Tensor
    statistics: SolverStatistics


def rms(x: Tensor, norm: Norm) -> Tensor:
    """Root of the mean square over everything, or over each row; its gradient at 0 is 0."""
    if norm == "batch":
        whole: Tensor = torch.linalg.vector_norm(x) * (x.numel() ** -0.5)
        return whole
    rows = x.reshape(len(x), -1)
    each: Tensor = torch.linalg.vector_norm(rows, dim=1) * (rows.shape[1] ** -0.5)
    return each


def largest_eigenvalue(last: LastStages, *, norm: Norm) -> Tensor:
    """Estimate of its magnitude from two stages at the same time; 0 where they coincide."""
    difference = rms(last.g - last.g_before, norm)
    # Where the states coincide so do their derivatives: 0 / 1, with gradient 0, and never 0 / 0.
    return rms(last.k - last.k_before, norm) / torch.where(difference > 0, difference, 1.0)


def scaled_error(error: Tensor, u: Tensor, new: Tensor, *, rtol: float, atol: Tensor, norm: Norm) -> Tensor:
    """EEst: rms of ``error / (atol + rtol max(abs u, abs new))``, for a step from u to new."""
    return rms(error / torch.add(atol, torch.maximum(u.abs(), new.abs()), alpha=rtol), norm)


def scaled_error_of_stages(
    weights: Sequence[float],
    stages: Sequence[Tensor],
    u: Tensor,
    new: Tensor,
    *,
    rtol: float,
    atol: Tensor,
    norm: Norm,
) -> Tensor:
    """:func:`scaled_error` of ``sum_i weights_i stages_i``; large states have a backward pass of their own."""
    if not torch.is_grad_enabled() or u.numel() < OWN_BACKWARD_FROM:
        return scaled_error(_weighted_sum(weights, stages), u, new, rtol=rtol, atol=atol, norm=norm)
    error: Tensor = _ScaledError.apply(weights, rtol, atol, norm, u, new, *stages)[0]  # type: ignore[no-untyped-call]
    return error


def _weighted_sum(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    total = stages[0] * weights[0]
    for weight, stage in zip(weights[1:], stages[1:], strict=True):
        total.add_(stage, alpha=weight)
    return total


OWN_BACKWARD_FROM = 65_536  # entries of the state; in smaller ones Python's part in it costs more than it saves


class _ScaledError(torch.autograd.Function):
    """EEst and the local error e that it measures; both are outputs, so that a second derivative can go through them.

    With s = atol + rtol max(abs u, abs new), r = e / s and n entries in a row, ``dEEst/de = r / (n EEst s)``, and the
    larger of u and new gets ``-rtol r sgn`` times that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weights: Sequence[float], rtol: float, atol: Tensor, norm: Norm, u: Tensor, new: Tensor, *stages: Tensor
    ) -> tuple[Tensor, Tensor]:
        error = _weighted_sum(weights, stages)
        return scaled_error(error, u, new, rtol=rtol, atol=atol, norm=norm), error

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.weights, ctx.rtol, atol, ctx.norm, u, new, *_ = inputs
        ctx.save_for_backward(*output, u, new, atol)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_value, by_error = grads
        by_u = by_new = None
        if by_value is not None:
            value, error, u, new, atol = ctx.saved_tensors
            before, after = u.abs(), new.abs()
            scale = torch.add(atol, torch.maximum(before, after), alpha=ctx.rtol)
            ratio = error / scale
            entries = error.numel() if ctx.norm == "batch" else error[0].numel()
            # Where the error is 0 so is the ratio: 0 / tiny and not 0 / 0.
            share = by_value / (value.clamp_min(torch.finfo(value.dtype).tiny) * entries)
            if ctx.norm == "sample":
                share = share.view(-1, *[1] * (error.ndim - 1))
            through_value = ratio / scale * share
            by_error = through_value if by_error is None else by_error + through_value
            by_larger = through_value * ratio * -ctx.rtol
            # 1 where u is the larger, 0 where new is, a half (as torch has it) where they are equal.
            of_u = by_larger * ((before - after).sign() * 0.5 + 0.5)
            by_u, by_new = of_u * u.sgn(), (by_larger - of_u) * new.sgn()
        weights = ctx.weights
        of_stages = (
            [None] * len(weights) if by_error is None else torch._foreach_mul([by_error] * len(weights), weights)
        )
        return None, None, None, None, by_u, by_new, *of_stages
