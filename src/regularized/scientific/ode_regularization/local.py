"""Two relatives of solver regularisation: the error of one step at a random time, and a random end time.

    Pal, Edelman, Rackauckas, "Locally Regularized Neural Differential Equations: Some Black Boxes Were Meant to Remain
    Closed!", ICML 2023, arXiv 2303.02262.  Official code: avik-pal/LocalRegNeuralDE.jl.
    Ghosh, Behl, Dupont, Torr, Namboodiri, "STEER: Simple Temporal Regularization for Neural ODEs", NeurIPS 2020,
    arXiv 2006.10711.

==================  ====================  =====================================================================
paper               here                  meaning
==================  ====================  =====================================================================
E_t h, t random     ``statistics``        error and stiffness of one step, which every penalty takes as they are
unbiased, biased    ``sampling``          t uniform over the span, or the start of an accepted step
T ~ U(T - b, T + b) ``RandomEndTime``     end of the span in training
==================  ====================  =====================================================================
"""

from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import Choice, allowed
from regularized.scientific.ode_regularization.layer import NeuralODE, NeuralSDE
from regularized.scientific.ode_regularization.ode_solver import Field, odeint, odeint_on_grid
from regularized.scientific.ode_regularization.solver_statistics import SolverStatistics

__all__ = ["LocalNeuralODE", "RandomEndTime"]


class LocalNeuralODE(NeuralODE):
    """A :class:`~regularized.scientific.ode_regularization.NeuralODE` whose penalty sees one step of each solve.

    In ``train()`` mode ``statistics`` hold the error of one step alone, and the evaluations and rejections of the whole
    call. The mean over many calls is the mean over the steps, at the cost of one; the price is noise in the gradient.

    Args:
        f: called with t, a tensor without dimensions, and u (B, ...).
        sampling: ``"unbiased"`` (default): a step from a time that is uniform over the span, as long as the accepted
            one around it, which costs its evaluations once more; it may reach beyond the span. ``"biased"``: one of the
            accepted steps, all equally likely, so that short ones count as much as long ones; it costs nothing.
        detach: hold the state from which the step starts constant; default False. For ``"unbiased"`` only.
        settings: those of ``NeuralODE``, but for ``steps``.

    Raises:
        ValueError: unknown sampling, steps that are fixed, or a biased step from a constant state.

    Examples:
        >>> from regularized.scientific.ode_regularization.penalty import solver_penalty
        >>> layer = LocalNeuralODE(lambda t, u: u.tanh())
        >>> out = layer(torch.randn(4, 2, requires_grad=True))
        >>> len(layer.statistics.step_sizes)
        1
        >>> bool(solver_penalty(layer.statistics) > 0)
        True
    """

    @allowed(sampling=Choice("unbiased", "biased"))
    def __init__(
        self,
        f: Field,
        *,
        sampling: Literal["unbiased", "biased"] = "unbiased",
        detach: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(f, **settings)
        if self.steps is not None:
            raise ValueError(f"the error of a random step needs adaptive steps; leave steps=None, got {self.steps}")
        if detach and sampling == "biased":
            raise ValueError('detach=True needs sampling="unbiased": a biased step is a part of the solve itself')
        self.sampling = sampling
        self.detach = detach

    def forward(self, u: Tensor) -> Tensor:
        """State at the end of the span, from the state (B, ...) at its start."""
        if not self.training:
            return super().forward(u)
        # Drawn on the host: times are Python numbers.
        share = float(torch.rand((), device="cpu"))
        start, end = self.span
        time = start + (end - start) * share
        unbiased = self.sampling == "unbiased" and start != time != end
        solution = odeint(
            self.f,
            u,
            (start, time, end) if unbiased else (start, end),
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            norm=self.norm,
            max_steps=self.max_steps,
            recompute=self.backprop == "checkpoint",
            record=not unbiased,
        )
        whole = solution.statistics
        if unbiased:
            ends = accumulate(whole.step_sizes)
            h = next((h for h, e in zip(whole.step_sizes, ends, strict=True) if e > share * abs(end - start)), None)
            local = self._step(time, h or whole.step_sizes[-1], solution.states[1])
        else:
            local = whole.only(int(share * len(whole.step_sizes)))
        local.evaluations += whole.evaluations
        local.rejected = whole.rejected
        self._statistics = local
        return solution.states[-1]

    def _step(self, time: float, h: float, u: Tensor) -> SolverStatistics:
        start, end = self.span
        return odeint_on_grid(
            self.f,
            u.detach() if self.detach else u,
            (time, time + h if end > start else time - h),
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            norm=self.norm,
        ).statistics

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{super().extra_repr()}, sampling={self.sampling!r}, detach={self.detach}"


class RandomEndTime(nn.Module):
    """A layer whose solve ends at a random time in training, so that no end time gets dynamics made for it alone.

    Args:
        layer: a ``NeuralODE``, ``LocalNeuralODE`` or ``NeuralSDE``, whose span's end T becomes uniform over
            ``[T - spread, T + spread]`` in ``train()`` mode, one draw a call.
        spread: b; default 0.5, which the paper of solver regularisation has for STEER with the span (0, 1).

    Raises:
        TypeError: another layer.
        ValueError: spread is not between 0 and the length of the span.

    Examples:
        >>> layer = RandomEndTime(NeuralODE(lambda t, u: 0 * u + 1, rtol=1e-4, atol=1e-4))
        >>> ends = layer(torch.zeros(3, 1))
        >>> bool((0.5 <= ends).all() and (ends <= 1.5).all()), bool((layer.eval()(torch.zeros(3, 1)) == 1).all())
        (True, True)
    """

    def __init__(self, layer: NeuralODE | NeuralSDE, *, spread: float = 0.5) -> None:
        super().__init__()
        if not isinstance(layer, NeuralODE | NeuralSDE):
            raise TypeError(f"RandomEndTime needs a NeuralODE or a NeuralSDE, got {type(layer).__name__}")
        start, end = layer.span
        if not 0.0 < spread < abs(end - start):
            raise ValueError(f"spread must lie between 0 and the span's length {abs(end - start):g}, got {spread}")
        self.layer = layer
        self.spread = spread

    @property
    def statistics(self) -> SolverStatistics:
        """Of the layer's last call."""
        return self.layer.statistics

    def forward(self, u: Tensor) -> Tensor:
        """State at a random end in training, at the span's end otherwise."""
        span = self.layer.span
        try:
            if self.training:
                draw = float(torch.rand((), device="cpu"))
                self.layer.span = (span[0], span[1] + self.spread * (2.0 * draw - 1.0))
            out: Tensor = self.layer(u)
        finally:
            self.layer.span = span
        return out

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"spread={self.spread}"
