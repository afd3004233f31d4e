"""Layers whose output is the solution of a differential equation, and which keep what the solver knows of its steps.

:mod:`regularized.scientific.ode_regularization.penalty` has the paper and its symbols.
"""

from typing import Any, Literal

from torch import Tensor, nn

from regularized.mechanisms.ranges import Choice, allowed, count
from regularized.scientific.ode_regularization.ode_solver import Field, check_pair, check_times, odeint, odeint_on_grid
from regularized.scientific.ode_regularization.sde_solver import sdeint, sdeint_on_grid
from regularized.scientific.ode_regularization.sde_tableaus import STOCHASTIC
from regularized.scientific.ode_regularization.solver_statistics import NORM, Norm, Solution, SolverStatistics

__all__ = ["NeuralODE", "NeuralSDE"]


class SolverLayer(nn.Module):
    """What both layers share: time span, tolerances, statistics of the last call."""

    @allowed(steps=count(1).or_none("adaptive steps"), norm=NORM, max_steps=count(1))
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
        self.span: tuple[float, ...] = tuple(check_times(span))
        if len(self.span) != 2:
            raise ValueError(f"span must hold the first and the last time, got {span}")
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.norm = norm
        self.steps = steps
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


class NeuralODE(SolverLayer):
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
        >>> import torch
        >>> from regularized.scientific.ode_regularization.penalty import solver_penalty
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

    @allowed(
        backprop=Choice(
            "direct",
            "checkpoint",
            remedy="solver statistics are not differentiable through the continuous adjoint, and checkpointing saves "
            "its memory with exact gradients",
        )
    )
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


class NeuralSDE(SolverLayer):
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
        >>> import torch
        >>> layer = NeuralSDE(lambda t, u: -u, lambda t, u: 0.1 * u)
        >>> layer(torch.ones(4, 2)).shape
        torch.Size([4, 2])
    """

    @allowed(method=Choice(*STOCHASTIC))
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
        self.drift = drift
        self.diffusion = diffusion

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
