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

The first step: Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", II.4; those that follow: see
:mod:`regularized.scientific.ode_regularization.step_control`.

With a graph, sums over the stages are chains of additions, which are faster than a stack and a product and no slower
than a function of our own; without one the stages share a buffer, and each sum is one product with it.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regularized.scientific.ode_regularization.ode_tableaus import PAIRS, EmbeddedPair
from regularized.scientific.ode_regularization.solver_statistics import (
    NORM,
    LastStages,
    Norm,
    Solution,
    SolverStatistics,
    rms,
    scaled_error,
    scaled_error_of_stages,
)
from regularized.scientific.ode_regularization.step_control import (
    Controller,
    check_controller,
    check_progress,
    not_finite,
    read_error,
)

__all__ = ["Solution", "SolverStatistics", "odeint", "odeint_on_grid"]

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def combine(u: Tensor, weights: Sequence[float], h: float, stages: Sequence[Tensor]) -> Tensor:
    """``u + h sum_i weights_i stages_i``, without the terms of weight 0."""
    total: Tensor | None = None
    for weight, k in zip(weights, stages, strict=False):
        if weight:
            # In place from the second on: addition keeps nothing for its gradient.
            total = torch.add(u, k, alpha=h * weight) if total is None else total.add_(k, alpha=h * weight)
    return u if total is None else total


class _Attempt(NamedTuple):
    """What one attempt of a step finds.

    Attributes:
        error: scaled error, of which at most 1 is accepted.
        state: at the end of the step.
        before: state of the last stage but one.
        stages: k_2, ..., k_s, of which the last is the derivative at the end.
    """

    error: Tensor
    state: Tensor
    before: Tensor
    stages: tuple[Tensor, ...]


class _Pair:
    """One attempt of a step: stages, next state, scaled error."""

    def __init__(
        self,
        f: Field,
        pair: EmbeddedPair,
        u: Tensor,
        *,
        rtol: float,
        atol: float,
        norm: Norm,
        recompute: bool,
        statistics: SolverStatistics,
    ) -> None:
        self.f = f
        self.pair = pair
        self.rtol = rtol
        self.norm = norm
        self.atol = torch.full((), atol, dtype=u.dtype, device=u.device)
        self.recompute = recompute
        self.statistics = statistics
        self.nodes, self.weights = _coefficients(pair.name, u.dtype, u.device)
        self.buffer: _Buffer | None = None

    def derivative(self, t: float, u: Tensor) -> Tensor:
        self.statistics.evaluations += 1
        return evaluate(self.f, t, u)

    def attempt(self, t: float, h: float, u: Tensor, k: Tensor) -> _Attempt:
        """One step of length h from u, whose derivative is k."""
        self.statistics.evaluations += self.pair.evaluations
        if not torch.is_grad_enabled():
            return self._in_buffer(t, h, u, k)
        if self.recompute:
            out: _Attempt = checkpoint(self._stages, t, h, u, k, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._stages(t, h, u, k)

    def _stages(self, t: float, h: float, u: Tensor, k: Tensor) -> _Attempt:
        ks, g, before = [k], u, u
        for row, time in zip(self.pair.a, self._times(t, h), strict=True):
            before, g = g, combine(u, row, h, ks)
            ks.append(evaluate(self.f, time, g))
        new = g if self.pair.solution is None else combine(u, self.pair.solution, h, ks)
        with torch.set_grad_enabled(self.statistics.recorded):
            used = [(h * weight, k) for weight, k in zip(self.pair.error, ks, strict=True) if weight]
            weights, stages = zip(*used, strict=True)
            error = scaled_error_of_stages(weights, stages, u, new, rtol=self.rtol, atol=self.atol, norm=self.norm)
        return _Attempt(error, new, before, tuple(ks[1:]))

    def _in_buffer(self, t: float, h: float, u: Tensor, k: Tensor) -> _Attempt:
        """The same; k_2, ... but for the last lie in the buffer, where the next attempt overwrites them."""
        if self.buffer is None:
            self.buffer = _Buffer(self.pair, self.weights, u)
        stages, sums, weights = self.buffer.stages, self.buffer.sums, self.buffer.weights
        torch.mul(self.weights, h, out=self.buffer.scaled)
        flat, shape = u.reshape(-1), u.shape
        stages[0].copy_(k)
        g = before = u
        for number, time in enumerate(self._times(t, h)):
            before, g = g, torch.addmv(flat, sums[number], weights[number]).view(shape)
            k = evaluate(self.f, time, g)
            stages[number + 1].copy_(k)
        new = g if self.pair.solution is None else torch.addmv(flat, sums[-1], weights[-1]).view(shape)
        local = torch.mv(sums[-1], weights[len(self.pair.a)]).view(shape)
        error = scaled_error(local, u, new, rtol=self.rtol, atol=self.atol, norm=self.norm)
        return _Attempt(error, new, before, (*stages[1:-1], k))

    def _times(self, t: float, h: float) -> tuple[Tensor, ...]:
        return self.nodes.mul(h).add_(t).unbind()

    def accept(self, h: float, done: _Attempt) -> None:
        last = LastStages(k=done.stages[-1], k_before=done.stages[-2], g=done.state, g_before=done.before)
        self.statistics.accept(abs(h), done.error, last)

    def between(self, x: float, h: float, u: Tensor, k: Tensor, done: _Attempt) -> Tensor:
        """State at the share x of the step."""
        weights = [sum(p * x ** (q + 1) for q, p in enumerate(row)) for row in self.pair.dense]
        return combine(u, weights, h, [k, *done.stages])


def _sums(pair: EmbeddedPair) -> list[tuple[float, ...]]:
    """Weights of all sums over the stages: their states, the error, and the solution where it is none of them."""
    return [*pair.a, pair.error, *([pair.solution] if pair.solution is not None else [])]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _coefficients(method: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a pair, one after the other; kept, so that only the first solve copies them to a device."""
    weights = [weight for row in _sums(PAIRS[method]) for weight in row]
    return torch.tensor(PAIRS[method].c, dtype=dtype, device=device), torch.tensor(weights, dtype=dtype, device=device)


class _Buffer:
    """Memory of the stages of one step, and views of it: a sum is a product of the first so many with their weights."""

    def __init__(self, pair: EmbeddedPair, weights: Tensor, like: Tensor) -> None:
        rows = _sums(pair)
        memory = like.new_empty(len(pair.a) + 1, like.numel())
        self.stages = memory.view(-1, *like.shape).unbind()
        columns = memory.T
        self.sums = [columns.narrow(1, 0, len(row)) for row in rows]
        self.scaled = torch.empty_like(weights)
        self.weights = self.scaled.split([len(row) for row in rows])


def evaluate(f: Field, t: float | Tensor, u: Tensor) -> Tensor:
    """``f(t, u)``, with t as a tensor without dimensions on the device of u.

    Raises:
        ValueError: f returned another shape.
    """
    k = f(t if isinstance(t, Tensor) else torch.full((), t, dtype=u.dtype, device=u.device), u)
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
    controller: Controller = "pi",
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
        times: T >= 1 times, rising or falling; constants, without a gradient. The state at a single one is ``u0``.
        method: ``"tsit5"`` (default, the paper's), ``"dopri5"`` or ``"bosh3"``.
        rtol: relative tolerance; default 1e-6.
        atol: absolute tolerance; default 1e-6.
        norm: ``"batch"`` (default, as in the paper's code): one error for the whole batch, its root mean square;
            ``"sample"``: one for each row, of which the largest decides about the step.
        controller: of the step size: ``"pi"`` (default, that of the paper's solver), or ``"integral"``, torchdiffeq's:
            fewer evaluations at equal tolerance, more at equal error.
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
    t = check_times(times, least=1)
    check_tolerances(rtol, atol, u0)
    check_norm(norm, u0)
    control = check_controller(controller)(pair.order)
    statistics = SolverStatistics(
        method=method, stability_size=pair.stability_size, norm=norm, recorded=record and torch.is_grad_enabled()
    )
    if len(t) == 1:
        return Solution(torch.stack([u0]), statistics)
    solver = _Pair(f, pair, u0, rtol=rtol, atol=atol, norm=norm, recompute=recompute, statistics=statistics)
    end, direction = t[-1], 1.0 if t[-1] > t[0] else -1.0
    now, u = t[0], u0
    k = solver.derivative(now, u)
    h = direction * (first_step if first_step is not None else _first_step(solver, now, end, u, k))
    states, wanted = [u0], 1
    attempts = 0
    while wanted < len(t):
        attempts += 1
        last = (end - now - h) * direction <= 1e-10 * abs(h)
        if last:
            h = end - now
        done = solver.attempt(now, h, u, k)
        error = read_error(done.error, time=now, h=h, state=u)
        if error > 1.0:
            statistics.rejected += 1
            h = control.rejected(h, error)
            check_progress(attempts, max_steps, time=now, h=h, error=error)
            continue
        solver.accept(h, done)
        reached = end if last else now + h
        while wanted < len(t) and (t[wanted] - reached) * direction <= 0.0:
            x = (t[wanted] - now) / h
            states.append(done.state if t[wanted] == reached else solver.between(x, h, u, k, done))
            wanted += 1
        now, u, k = reached, done.state, done.stages[-1]
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
    solver = _Pair(f, pair, u0, rtol=rtol, atol=atol, norm=norm, recompute=recompute, statistics=statistics)
    u, k = u0, solver.derivative(t[0], u0)
    states = [u0]
    for now, reached in pairwise(t):
        done = solver.attempt(now, reached - now, u, k)
        solver.accept(reached - now, done)
        u, k = done.state, done.stages[-1]
        states.append(u)
    return Solution(torch.stack(states), statistics)


@torch.no_grad()
def _first_step(solver: _Pair, now: float, end: float, u: Tensor, k: Tensor) -> float:
    """Hairer, Norsett & Wanner I, II.4: one explicit Euler step tells how fast f changes; one read."""
    order, span = solver.pair.order, abs(end - now)
    scale = torch.add(solver.atol, u.abs(), alpha=solver.rtol)
    d0, d1 = rms(u / scale, "batch"), rms(k / scale, "batch")
    h0 = torch.where(torch.minimum(d0, d1) < 1e-5, 1e-6, d0 / d1 * 0.01).clamp_(max=span)
    signed = h0 if end > now else -h0
    solver.statistics.evaluations += 1
    changed = evaluate(solver.f, signed + now, torch.addcmul(u, k, signed))
    d2 = rms((changed - k) / scale, "batch")
    euler, slope, difference = torch.stack((h0, d1, d2)).tolist()
    steepest = max(slope, difference / euler) if euler else math.nan
    if not math.isfinite(steepest):
        raise RuntimeError(not_finite(now, 0.0, u))
    h: float = max(1e-6, 1e-3 * euler) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / (order + 1))
    return float(min(100.0 * euler, h, span))


# -- shared checks ------------------------------------------------------------------------------


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


def check_times(times: Sequence[float] | Tensor, *, least: Literal[1, 2] = 2) -> list[float]:
    """Times as Python numbers.

    Raises:
        ValueError: fewer than ``least``, not finite, neither rising nor falling, or with a gradient.
    """
    if isinstance(times, Tensor) and times.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "times get no gradient here, and these ask for one. Give times.detach(); to learn an end time T, solve "
            "du/ds = T f(T s, u) over s in [0, 1]"
        )
    t: list[float] = times.tolist() if isinstance(times, Tensor) else [float(value) for value in times]
    if not isinstance(t, list) or len(t) < least:
        values = {1: "one value", 2: "two values"}[least]
        raise ValueError(f"times must hold at least {values}, the first one that of the start; got {times}")
    steps = [b - a for a, b in pairwise(t)]
    if not all(map(math.isfinite, t)) or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise ValueError(f"times must be finite and strictly rising or strictly falling, got {t}")
    return t


def check_tolerances(rtol: float, atol: float, state: Tensor) -> None:
    """Refuse tolerances that the type of the state cannot meet.

    Raises:
        ValueError: with the smallest sane tolerance.
        TypeError: the state is not one tensor of a floating type.
    """
    if not isinstance(state, Tensor):
        raise TypeError(
            f"the state must be one tensor, got {type(state).__name__}; of several parts make one, such as "
            "torch.cat([part.flatten(1) for part in parts], dim=1), and split it again in f"
        )
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
    NORM("norm", norm)
    if norm == "sample" and state.ndim < 2:
        raise ValueError(f'norm="sample" needs a state of shape (B, ...), got {tuple(state.shape)}')
    if state.numel() == 0:
        raise ValueError(f"the state is empty: shape {tuple(state.shape)}")
