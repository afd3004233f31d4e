"""What an adaptive solve knows about its steps, with the graph of it: errors, lengths, estimates of stiffness.

The estimate of stiffness: Hairer & Wanner, "Solving Ordinary Differential Equations II", IV.2.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Solution", "SolverStatistics"]

Norm: TypeAlias = Literal["batch", "sample"]
# Shapes: B samples, N accepted steps, T times that were asked for; the state is (B, ...) or anything else.


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
        self._last_stages: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._stiffness: Tensor | None = None

    def accept(self, size: float, error: Tensor, last_stages: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Note an accepted step; ``last_stages`` are k and k before it, g and g before it, of the last two stages."""
        self.step_sizes.append(size)
        self._errors.append(error)
        if self.recorded:
            self._last_stages.append(last_stages)

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
            self._stiffness = torch.stack(
                [largest_eigenvalue(*stages, norm=self._norm) for stages in self._last_stages]
            )
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


def largest_eigenvalue(k_last: Tensor, k_before: Tensor, g_last: Tensor, g_before: Tensor, *, norm: Norm) -> Tensor:
    """Estimate of its magnitude from two stages at the same time; 0 where they coincide."""
    difference = rms(g_last - g_before, norm)
    # Where the states coincide so do their derivatives: 0 / 1, with gradient 0, and never 0 / 0.
    return rms(k_last - k_before, norm) / torch.where(difference > 0, difference, 1.0)


def scaled_error(error: Tensor, size: Tensor, next_size: Tensor, *, rtol: float, atol: Tensor, norm: Norm) -> Tensor:
    """EEst: rms of ``error / (atol + rtol max(size, next_size))``, for sizes ``abs u`` and ``abs u'``."""
    return rms(error / torch.add(atol, torch.maximum(size, next_size), alpha=rtol), norm)
