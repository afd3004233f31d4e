"""Adaptive embedded Runge-Kutta solver whose local errors and stiffness estimates are differentiable.

Gradients go through the accepted steps as they were computed (discretise, then optimise). Step sizes, acceptance and
the first step are constants; a rejected attempt leaves no graph. One number is read from the device for each attempted
step, and one more for the first step size; none on a grid that is given.

=============  ====================  ==========================================================================
paper, solver  here                  meaning
=============  ====================  ==========================================================================
EEst_j         ``errors[j]``         rms of error / (atol + rtol max(abs u, abs u')); at most 1 when accepted
h_j            ``step_sizes[j]``     length of step j
eigen_est_j    ``stiffness[j]``      rms(k_7 - k_6) / rms(g_7 - g_6), of the last two stages, both at t + h
R_E, R_S       ``solver_penalty``    sums or means over the steps
=============  ====================  ==========================================================================

The estimate of stiffness: Hairer & Wanner, "Solving Ordinary Differential Equations II", IV.2; the first step: Hairer,
Norsett & Wanner I, II.4. The step size follows the PI controller of the Julia solvers that the paper used.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regularized.scientific.ode_tableaus import PAIRS, EmbeddedPair

__all__ = ["Solution", "SolverStatistics", "StepController", "odeint", "odeint_on_grid"]

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]
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

    @property
    def errors(self) -> Tensor:
        """(N,) scaled local errors EEst; (N, B) with ``norm="sample"``."""
        return torch.stack(self._errors)

    @property
    def errors_times_steps(self) -> Tensor:
        """(N,) or (N, B) products of scaled error and length of the step, what the error regulariser is made of."""
        return torch.stack([error * size for error, size in zip(self._errors, self.step_sizes, strict=True)])

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
            self._stiffness = torch.stack([_stiffness(*stages, norm=self._norm) for stages in self._last_stages])
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


def _rms(x: Tensor, norm: Norm) -> Tensor:
    """Root of the mean square over everything, or over each row; its gradient at 0 is 0."""
    if norm == "batch":
        whole: Tensor = torch.linalg.vector_norm(x) * (x.numel() ** -0.5)
        return whole
    rows = x.reshape(len(x), -1)
    each: Tensor = torch.linalg.vector_norm(rows, dim=1) * (rows.shape[1] ** -0.5)
    return each


def _stiffness(k_last: Tensor, k_before: Tensor, g_last: Tensor, g_before: Tensor, *, norm: Norm) -> Tensor:
    difference = _rms(g_last - g_before, norm)
    # Where the states coincide so do their derivatives: 0 / 1, with gradient 0, and never 0 / 0.
    return _rms(k_last - k_before, norm) / torch.where(difference > 0, difference, 1.0)


def scaled_error(error: Tensor, size: Tensor, next_size: Tensor, *, rtol: float, atol: float, norm: Norm) -> Tensor:
    """EEst: rms of ``error / (atol + rtol max(size, next_size))``, for sizes ``abs u`` and ``abs u'``."""
    return _rms(error / torch.maximum(size, next_size).mul(rtol).add(atol), norm)


def combine(u: Tensor, weights: Sequence[float], h: float, stages: Sequence[Tensor]) -> Tensor:
    """``u + h sum_i weights_i stages_i``, without the terms of weight 0."""
    total: Tensor | None = None
    for weight, k in zip(weights, stages, strict=False):
        if weight:
            # In place from the second on: addition keeps nothing for its gradient.
            total = torch.add(u, k, alpha=h * weight) if total is None else total.add_(k, alpha=h * weight)
    return u if total is None else total


class StepController:
    """PI control of the step size: ``h / clamp(EEst^b1 / previous^b2 / safety)``, with b1 = 0.7 / p and b2 = 0.4 / p.

    For order p = 5 these are 7/50 and 2/25, as in the Julia solvers of the paper.

    Args:
        order: p.
        largest: largest growth in one step; default 10, that of the Julia solvers.
        smallest: smallest factor; default 0.2.
        safety: default 0.9.

    Examples:
        >>> control = StepController(5)
        >>> control.accepted(0.1, 1.0) < 0.1 < control.accepted(0.1, 1e-6)
        True
    """

    def __init__(self, order: float, *, largest: float = 10.0, smallest: float = 0.2, safety: float = 0.9) -> None:
        self._proportional, self._integral = 0.7 / order, 0.4 / order
        self._largest, self._smallest, self._safety = largest, smallest, safety
        self._previous = 1e-4

    def accepted(self, h: float, error: float) -> float:
        """Next step size after a step of error <= 1."""
        q: float = error**self._proportional / self._previous**self._integral / self._safety
        self._previous = max(error, 1e-4)
        return h / min(max(q, 1.0 / self._largest), 1.0 / self._smallest)

    def rejected(self, h: float, error: float) -> float:
        """Step size of the next attempt, after one of error > 1."""
        q: float = error**self._proportional / self._safety
        return h / min(1.0 / self._smallest, q)


class _Pair:
    """One attempt of a step: stages, next state, scaled error."""

    def __init__(
        self,
        f: Field,
        pair: EmbeddedPair,
        *,
        rtol: float,
        atol: float,
        norm: Norm,
        recompute: bool,
        statistics: SolverStatistics,
    ) -> None:
        self.f, self.pair = f, pair
        self.rtol, self.atol, self.norm = rtol, atol, norm
        self.recompute = recompute
        self.statistics = statistics

    def derivative(self, t: float, u: Tensor) -> Tensor:
        self.statistics.evaluations += 1
        return evaluate(self.f, t, u)

    def attempt(self, t: float, h: float, u: Tensor, k: Tensor) -> list[Tensor]:
        """``[error, next state, g of the last stage but one, k_2, ..., k_s]``."""
        self.statistics.evaluations += self.pair.evaluations
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._stages, t, h, u, k, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._stages(t, h, u, k)
        stages: list[Tensor] = list(out)
        return stages

    def _stages(self, t: float, h: float, u: Tensor, k: Tensor) -> list[Tensor]:
        ks, g, before = [k], u, u
        for row, c in zip(self.pair.a, self.pair.c, strict=True):
            before, g = g, combine(u, row, h, ks)
            ks.append(evaluate(self.f, t + c * h, g))
        new = g if self.pair.solution is None else combine(u, self.pair.solution, h, ks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.statistics.recorded):
            error = self._error(h, u, new, ks)
        return [error, new, before, *ks[1:]]

    def _error(self, h: float, u: Tensor, new: Tensor, ks: list[Tensor]) -> Tensor:
        first, *rest = self.pair.error
        local = combine(ks[0].mul(h * first), rest, h, ks[1:])
        return scaled_error(local, u.abs(), new.abs(), rtol=self.rtol, atol=self.atol, norm=self.norm)

    def accept(self, h: float, out: list[Tensor]) -> None:
        error, new, before = out[:3]
        self.statistics.accept(abs(h), error, (out[-1], out[-2], new, before))

    def between(self, x: float, h: float, u: Tensor, k: Tensor, out: list[Tensor]) -> Tensor:
        """State at the share x of the step."""
        weights = [sum(p * x ** (q + 1) for q, p in enumerate(row)) for row in self.pair.dense]
        return combine(u, weights, h, [k, *out[3:]])


def evaluate(f: Field, t: float, u: Tensor) -> Tensor:
    """``f(t, u)``, with t as a tensor without dimensions on the device of u.

    Raises:
        ValueError: f returned another shape.
    """
    k = f(torch.full((), t, dtype=u.dtype, device=u.device), u)
    if k.shape != u.shape:
        raise ValueError(f"f(t, u) must return the shape of u, {tuple(u.shape)}; it returned {tuple(k.shape)}")
    return k


def odeint(
    f: Field,
    u0: Tensor,
    times: Sequence[float] | Tensor,
    *,
    method: str = "tsit5",
    rtol: float = 1e-6,
    atol: float = 1e-6,
    norm: Norm = "batch",
    first_step: float | None = None,
    max_steps: int = 10_000,
    recompute: bool = False,
    record: bool = True,
) -> Solution:
    """Solve ``u' = f(t, u)`` with as many steps as the tolerances ask for; all rows of the batch share them.

    States at times between the ends come from the pair's interpolant, so that asking for more of them changes neither
    the steps nor the statistics.

    Args:
        f: called with t, a tensor without dimensions, and u.
        u0: state at the first time, any shape, floating point.
        times: T >= 2 times, rising or falling.
        method: ``"tsit5"`` (default, the paper's), ``"dopri5"`` or ``"bosh3"``.
        rtol: relative tolerance; default 1e-6.
        atol: absolute tolerance; default 1e-6.
        norm: ``"batch"`` (default, as in the paper's code): one error for the whole batch, its root mean square;
            ``"sample"``: one for each row, of which the largest decides about the step.
        first_step: length of the first step; default by the rule of Hairer, Norsett & Wanner.
        max_steps: attempts after which to give up; default 10,000.
        recompute: keep states only, and compute the stages of a step again in the backward pass; default False. f must
            then be deterministic.
        record: keep errors and stiffness with their graph; default True. Without it the errors are plain numbers.

    Returns:
        States at the times, and the statistics of the accepted steps.

    Raises:
        ValueError: an argument is outside its range; f returns another shape.
        RuntimeError: too many steps, a step too small for the time, or values that are not finite.

    Examples:
        >>> u0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> solution = odeint(lambda t, u: -u, u0, [0.0, 0.5, 1.0], rtol=1e-9, atol=1e-9)
        >>> torch.allclose(solution.states[-1], u0 * torch.tensor(-1.0).exp(), rtol=1e-7)
        True
        >>> solution.statistics.evaluations, solution.statistics.rejected
        (134, 0)
    """
    pair = check_pair(method)
    t = check_times(times)
    check_tolerances(rtol, atol, u0)
    check_norm(norm, u0)
    statistics = SolverStatistics(
        method=method, stability_size=pair.stability_size, norm=norm, recorded=record and torch.is_grad_enabled()
    )
    solver = _Pair(f, pair, rtol=rtol, atol=atol, norm=norm, recompute=recompute, statistics=statistics)
    end, direction = t[-1], 1.0 if t[-1] > t[0] else -1.0
    now, u = t[0], u0
    k = solver.derivative(now, u)
    h = direction * (first_step if first_step is not None else _first_step(solver, now, end, u, k))
    control = StepController(pair.order)
    states, wanted = [u0], 1
    attempts = 0
    while wanted < len(t):
        attempts += 1
        last = (end - now - h) * direction <= 1e-10 * abs(h)
        if last:
            h = end - now
        out = solver.attempt(now, h, u, k)
        error = read_error(out[0], time=now, h=h, state=u)
        if error > 1.0:
            statistics.rejected += 1
            h = control.rejected(h, error)
            check_progress(attempts, max_steps, time=now, h=h, error=error)
            continue
        solver.accept(h, out)
        reached = end if last else now + h
        while wanted < len(t) and (t[wanted] - reached) * direction <= 0.0:
            x = (t[wanted] - now) / h
            states.append(out[1] if t[wanted] == reached else solver.between(x, h, u, k, out))
            wanted += 1
        now, u, k = reached, out[1], out[-1]
        h = control.accepted(h, error)
        if wanted < len(t):
            check_progress(attempts, max_steps, time=now, h=h, error=error)
    return Solution(torch.stack(states), statistics)


def odeint_on_grid(
    f: Field,
    u0: Tensor,
    grid: Sequence[float] | Tensor,
    *,
    method: str = "tsit5",
    rtol: float = 1e-6,
    atol: float = 1e-6,
    norm: Norm = "batch",
    recompute: bool = False,
    record: bool = True,
) -> Solution:
    """Solve ``u' = f(t, u)`` with the steps of a given grid, whatever their errors; nothing is read from the device.

    Args:
        f: called with t, a tensor without dimensions, and u.
        u0: state at the first time.
        grid: T >= 2 times, rising or falling; each is the end of a step.
        method: as in :func:`odeint`, as all that follow. Tolerances scale the errors only.
        rtol: relative tolerance.
        atol: absolute tolerance.
        norm: ``"batch"`` or ``"sample"``.
        recompute: compute the stages again in the backward pass.
        record: keep errors and stiffness with their graph.

    Returns:
        States at the times of the grid, and the statistics of all steps.

    Examples:
        >>> solution = odeint_on_grid(lambda t, u: u, torch.ones(1), [0.0, 0.5, 1.0])
        >>> [round(float(u), 4) for u in solution.states]
        [1.0, 1.6487, 2.7183]
    """
    pair = check_pair(method)
    t = check_times(grid)
    check_tolerances(rtol, atol, u0)
    check_norm(norm, u0)
    statistics = SolverStatistics(
        method=method, stability_size=pair.stability_size, norm=norm, recorded=record and torch.is_grad_enabled()
    )
    solver = _Pair(f, pair, rtol=rtol, atol=atol, norm=norm, recompute=recompute, statistics=statistics)
    u, k = u0, solver.derivative(t[0], u0)
    states = [u0]
    for now, reached in pairwise(t):
        out = solver.attempt(now, reached - now, u, k)
        solver.accept(reached - now, out)
        u, k = out[1], out[-1]
        states.append(u)
    return Solution(torch.stack(states), statistics)


@torch.no_grad()
def _first_step(solver: _Pair, now: float, end: float, u: Tensor, k: Tensor) -> float:
    """Hairer, Norsett & Wanner I, II.4: one explicit Euler step tells how fast f changes; one number is read."""
    scale = u.abs() * solver.rtol + solver.atol
    order, span = solver.pair.order, abs(end - now)
    d0, d1 = _rms(u / scale, "batch"), _rms(k / scale, "batch")
    small = torch.minimum(d0, d1) < 1e-5
    h0 = torch.where(small, 1e-6, 0.01 * d0 / torch.where(small, 1.0, d1)).clamp(max=span)
    signed = h0 if end > now else -h0
    solver.statistics.evaluations += 1
    changed = solver.f(signed + now, u + signed * k)
    steepest = torch.maximum(d1, _rms((changed - k) / scale, "batch") / h0)
    h1 = torch.where(
        steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-15)) ** (1 / (order + 1))
    )
    h = float(torch.minimum(100.0 * h0, h1))
    if not math.isfinite(h):
        raise RuntimeError(_not_finite(now, 0.0, u))
    return min(h, span)


# -- shared checks ------------------------------------------------------------------------------


def read_error(error: Tensor, *, time: float, h: float, state: Tensor) -> float:
    """The one read of an attempt: the largest scaled error.

    Raises:
        RuntimeError: it is not finite.
    """
    value = float(error.detach() if error.ndim == 0 else error.detach().amax())
    if not math.isfinite(value):
        raise RuntimeError(_not_finite(time, h, state))
    return value


def _not_finite(time: float, h: float, state: Tensor) -> str:
    return (
        f"the derivatives are not finite in a step of {h:.3g} from t = {time:.6g}, where the state has norm "
        f"{float(torch.linalg.vector_norm(state.detach())):.3g}: the dynamics blew up, or the inputs are not finite. "
        "Bound the dynamics (tanh), lower the learning rate, or give a smaller first_step"
    )


def check_progress(attempts: int, max_steps: int, *, time: float, h: float, error: float) -> None:
    """Refuse to go on for ever.

    Raises:
        RuntimeError: with time, step and error.
    """
    where = f"at t = {time:.6g} with step {h:.3g} and scaled error {error:.3g}"
    if attempts >= max_steps:
        raise RuntimeError(
            f"the solver took max_steps={max_steps} attempts and stopped {where}: the dynamics blew up or became "
            "stiff. Loosen rtol and atol, regularise the solver, or raise max_steps"
        )
    if abs(h) <= 1e-14 * max(abs(time), 1e-3):
        raise RuntimeError(
            f"the step became too small to move the time, {where}: the dynamics blew up or have a jump. Loosen rtol "
            "and atol, or bound the dynamics (tanh)"
        )


def check_pair(method: str) -> EmbeddedPair:
    """The pair of this name.

    Raises:
        ValueError: there is none, or the method has no error estimate.
    """
    if method not in PAIRS:
        raise ValueError(
            f"method must be an embedded pair, whose two solutions give the error: {', '.join(PAIRS)}; got {method!r}"
        )
    return PAIRS[method]


def check_times(times: Sequence[float] | Tensor) -> list[float]:
    """Times as Python numbers.

    Raises:
        ValueError: fewer than two, not finite, or neither rising nor falling.
    """
    t: list[float] = times.tolist() if isinstance(times, Tensor) else [float(value) for value in times]
    if not isinstance(t, list) or len(t) < 2:
        raise ValueError(f"times must hold at least two values, the first one that of the start; got {times}")
    steps = [b - a for a, b in pairwise(t)]
    if not all(map(math.isfinite, t)) or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise ValueError(f"times must be finite and strictly rising or strictly falling, got {t}")
    return t


def check_tolerances(rtol: float, atol: float, state: Tensor) -> None:
    """Refuse tolerances that the type of the state cannot meet.

    Raises:
        ValueError: with the smallest sane tolerance.
        TypeError: the state is not of a floating type.
    """
    if not state.is_floating_point():
        raise TypeError(f"the state must be of a floating point type, got {state.dtype}; convert it with .float()")
    smallest = 4.0 * torch.finfo(state.dtype).eps
    if not (rtol >= 0.0 and atol >= 0.0 and math.isfinite(rtol) and math.isfinite(atol)):
        raise ValueError(f"rtol and atol must be >= 0 and finite, got rtol={rtol}, atol={atol}")
    if max(rtol, atol) < smallest:
        raise ValueError(
            f"rtol={rtol} and atol={atol} are below what {state.dtype} can resolve; the smallest sane tolerance is "
            f"about {smallest:.1g}. Loosen them, or solve in torch.float64"
        )


def check_norm(norm: str, state: Tensor) -> None:
    """Refuse an unknown norm, or one over rows of a state that has none.

    Raises:
        ValueError: with what is allowed.
    """
    if norm not in ("batch", "sample"):
        raise ValueError(f'norm must be "batch" or "sample", got {norm!r}')
    if norm == "sample" and state.ndim < 2:
        raise ValueError(f'norm="sample" needs a state of shape (B, ...), got {tuple(state.shape)}')
    if state.numel() == 0:
        raise ValueError(f"the state is empty: shape {tuple(state.shape)}")
