"""Adaptive stochastic Runge-Kutta solver with differentiable errors, for ``du = f dt + g dW`` with diagonal Ito noise.

Strong order 1.5 by Roessler's methods; each step needs the increment W and its integral A over the step. When a step is
rejected, what was drawn stays: the shorter attempt divides it by the exact conditional law (a Brownian bridge of the
pair), so that rejecting a step never chooses the path. The noise is a constant for gradients.

==========  ==============  ==============================================================================
paper       here            meaning
==========  ==============  ==============================================================================
dW          ``increment``   W(t + h) - W(t), variance h
I_(1,0)     ``area``        integral of W(s) - W(t) over the step, h (dW + dZ / sqrt 3) / 2
k_i, g_i    ``k``, ``g``    drift and diffusion of stage i, at the states H0_i and H1_i
==========  ==============  ==============================================================================
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from regularized.scientific.ode_regularization.ode_solver import (
    Field,
    check_norm,
    check_times,
    check_tolerances,
    combine,
    evaluate,
)
from regularized.scientific.ode_regularization.sde_tableaus import STOCHASTIC, StochasticTableau
from regularized.scientific.ode_regularization.solver_statistics import (
    LastStages,
    Norm,
    Solution,
    SolverStatistics,
    scaled_error_of_stages,
)
from regularized.scientific.ode_regularization.step_control import StepController, check_progress, read_error

__all__ = ["BrownianPath", "Increment", "sdeint", "sdeint_on_grid"]


class Increment(NamedTuple):
    """A piece of a Brownian path.

    Attributes:
        length: of the piece in time.
        increment: W at its end less W at its start.
        area: integral of W less its start.
    """

    length: float
    increment: Tensor
    area: Tensor


class BrownianPath:
    """A Brownian path that is drawn as far as it is looked at, and never drawn anew.

    Args:
        like: tensor of the shape, type and device of the noise.
        generator: source of randomness on that device; default torch's global one.

    Raises:
        TypeError: ``like`` is not of a floating type.

    Examples:
        >>> path = BrownianPath(torch.zeros(3), generator=torch.Generator().manual_seed(0))
        >>> whole = path.ahead(1.0)
        >>> first = path.ahead(0.25)            # a shorter attempt on the same path
        >>> path.advance(0.25)
        >>> rest = path.ahead(0.75)
        >>> torch.allclose(first.increment + rest.increment, whole.increment)
        True
    """

    def __init__(self, like: Tensor, *, generator: torch.Generator | None = None) -> None:
        if not like.is_floating_point():
            raise TypeError(f"a Brownian path needs a floating point type, got {like.dtype}; convert it with .float()")
        self._like = like.detach()
        self._generator = generator
        self._pieces: list[Increment] = []

    @torch.no_grad()
    def ahead(self, h: float) -> Increment:
        """The piece of length h from where the path is; it stays ahead until :meth:`advance`."""
        count = self._cut(h)
        whole = self._pieces[0]
        for piece in self._pieces[1:count]:
            # What comes later starts from where the earlier piece ended.
            area = whole.area + piece.area + whole.increment * piece.length
            whole = Increment(whole.length + piece.length, whole.increment + piece.increment, area)
        return whole

    @torch.no_grad()
    def advance(self, h: float) -> None:
        """Leave the next piece of length h behind."""
        del self._pieces[: self._cut(h)]

    def _cut(self, h: float) -> int:
        """Make pieces end at h from here; how many there are until then."""
        done = 0.0
        for number, piece in enumerate(self._pieces):
            missing = h - done
            if abs(missing - piece.length) <= 1e-12 * h:
                return number + 1
            if missing < piece.length:
                self._pieces[number : number + 1] = self._bridge(piece, missing)
                return number + 1
            done += piece.length
        missing = h - done
        z = self._normal(), self._normal()
        self._pieces.append(
            Increment(missing, z[0] * missing**0.5, (z[0] + z[1] / 3**0.5) * (0.5 * missing**1.5)),
        )
        return len(self._pieces)

    def _bridge(self, piece: Increment, s: float) -> tuple[Increment, Increment]:
        """Divide a piece at s by the law of (W_s, A_s) given (W_h, A_h); in units where h = 1."""
        h, x = piece.length, s / piece.length
        # Covariances of W_x with (W_1, A_1), and of A_x with them.
        with_w, with_a = (x, x * x / 2), (x - x * x / 2, x * x / 2 - x**3 / 6)
        # [[1, 1/2], [1/2, 1/3]] inverted is [[4, -6], [-6, 12]].
        m = [(4 * w - 6 * a, -6 * w + 12 * a) for w, a in zip(with_w, with_a, strict=True)]
        own = (x, x * x / 2, x**3 / 3)
        v_w = own[0] - m[0][0] * with_w[0] - m[0][1] * with_a[0]
        v_wa = own[1] - m[0][0] * with_w[1] - m[0][1] * with_a[1]
        v_a = own[2] - m[1][0] * with_w[1] - m[1][1] * with_a[1]
        l_w = math.sqrt(max(v_w, 0.0))
        l_wa = v_wa / l_w if l_w else 0.0
        l_a = math.sqrt(max(v_a - l_wa * l_wa, 0.0))
        w, a = piece.increment / h**0.5, piece.area / h**1.5
        z = self._normal(), self._normal()
        first_w = (m[0][0] * w + m[0][1] * a + l_w * z[0]) * h**0.5
        first_a = (m[1][0] * w + m[1][1] * a + l_wa * z[0] + l_a * z[1]) * h**1.5
        rest_a = piece.area - first_a - first_w * (h - s)
        return Increment(s, first_w, first_a), Increment(h - s, piece.increment - first_w, rest_a)

    def _normal(self) -> Tensor:
        like = self._like
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=self._generator)


class _Attempt(NamedTuple):
    """What one attempt of a step finds: the state at its end, the scaled error, and its last two stages."""

    state: Tensor
    error: Tensor
    last: LastStages


class _Method:
    """One attempt of a step."""

    def __init__(
        self,
        drift: Field,
        diffusion: Field,
        table: StochasticTableau,
        u: Tensor,
        *,
        rtol: float,
        atol: float,
        norm: Norm,
        statistics: SolverStatistics,
    ) -> None:
        self.drift = drift
        self.diffusion = diffusion
        self.table = table
        self.rtol = rtol
        self.norm = norm
        self.atol = torch.full((), atol, dtype=u.dtype, device=u.device)
        self.statistics = statistics

    def noise(self, t: float, u: Tensor) -> Tensor:
        try:
            return evaluate(self.diffusion, t, u)
        except ValueError as error:
            raise ValueError(f"diffusion must return the shape of u (diagonal noise): {error}") from None

    def attempt(self, t: float, u: Tensor, piece: Increment) -> _Attempt:
        """One step from u along a piece of the path."""
        self.statistics.evaluations += 4
        table, h = self.table, piece.length
        root = h**0.5
        dw = piece.increment
        chi1 = (dw.square() - h) / (2 * root)
        chi2 = piece.area / h
        chi3 = (dw**3 - 3 * h * dw) / (6 * h)
        k: list[Tensor] = []
        g: list[Tensor] = []
        h0: list[Tensor] = []
        for i in range(4):
            if i == 0:
                state0 = state1 = u
            else:
                state0 = combine(u, table.a0[i - 1], h, k) + chi2 * weighted(table.b0[i - 1], g)
                state1 = combine(combine(u, table.a1[i - 1], h, k), table.b1[i - 1], root, g)
            h0.append(state0)
            k.append(evaluate(self.drift, t + table.c0[i] * h, state0))
            g.append(self.noise(t + table.c1[i] * h, state1))
        e2 = chi2 * weighted(table.beta3, g) + chi3 * weighted(table.beta4, g)
        new = combine(u, table.alpha, h, k) + e2 + dw * weighted(table.beta1, g) + chi1 * weighted(table.beta2, g)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.statistics.recorded):
            # E1 + E2, with the delta of 1 of both methods
            error = scaled_error_of_stages(
                (1.0, h, h, h, h), (e2, *k), u, new, rtol=self.rtol, atol=self.atol, norm=self.norm
            )
        return _Attempt(new, error, LastStages(k=k[3], k_before=k[2], g=h0[3], g_before=h0[2]))


def weighted(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """``sum_i weights_i stages_i`` over as many as there are weights."""
    return combine(stages[0] * weights[0], weights[1:], 1.0, stages[1:])


def _method(
    drift: Field,
    diffusion: Field,
    u0: Tensor,
    method: str,
    rtol: float,
    atol: float,
    norm: Norm,
    record: bool,
) -> _Method:
    if method not in STOCHASTIC:
        raise ValueError(f"method must be one of {', '.join(STOCHASTIC)}, which estimate their error; got {method!r}")
    check_tolerances(rtol, atol, u0)
    check_norm(norm, u0)
    table = STOCHASTIC[method]
    recorded = record and torch.is_grad_enabled()
    statistics = SolverStatistics(method=method, stability_size=table.stability_size, norm=norm, recorded=recorded)
    return _Method(drift, diffusion, table, u0, rtol=rtol, atol=atol, norm=norm, statistics=statistics)


def _rising(times: Sequence[float] | Tensor) -> list[float]:
    t = check_times(times)
    if t[-1] < t[0]:
        raise ValueError(f"a stochastic equation is solved forward in time; times must rise, got {t}")
    return t


def sdeint(
    drift: Field,
    diffusion: Field,
    u0: Tensor,
    times: Sequence[float] | Tensor,
    *,
    method: str = "sosri",
    rtol: float = 0.01,
    atol: float = 0.01,
    norm: Norm = "batch",
    first_step: float | None = None,
    max_steps: int = 10_000,
    generator: torch.Generator | None = None,
    record: bool = True,
) -> Solution:
    """Solve ``du = drift dt + diffusion dW`` with diagonal Ito noise, with as many steps as the tolerances ask for.

    Steps end at the times that are asked for, since between them a path is not a polynomial: more times may mean more
    steps.

    Args:
        drift: called with t, a tensor without dimensions, and u; returns the shape of u.
        diffusion: likewise; one coefficient for each entry of u.
        u0: state at the first time, floating point; every entry has a noise of its own.
        times: T >= 2 rising times.
        method: ``"sosri"`` (default, the paper's for error regularisation) or ``"sosri2"``, which estimates stiffness.
        rtol: relative tolerance; default 0.01.
        atol: absolute tolerance; default 0.01. The paper trains with 0.14.
        norm: ``"batch"`` (default) or ``"sample"``, as in :func:`~regularized.scientific.ode_regularization.odeint`.
        first_step: length of the first step; default a hundredth of the time in which drift or noise change the state.
        max_steps: attempts after which to give up; default 10,000.
        generator: source of the noise, on the device of u0; default torch's global one.
        record: keep errors and stiffness with their graph; default True.

    Returns:
        States at the times, and the statistics of the accepted steps; ``evaluations`` counts the calls of the drift,
        which are as many as those of the diffusion.

    Raises:
        ValueError: an argument is outside its range, or drift or diffusion return another shape.
        RuntimeError: too many steps, a step too small, or values that are not finite.

    Examples:
        >>> noise = torch.Generator().manual_seed(0)
        >>> solution = sdeint(lambda t, u: -u, lambda t, u: 0.1 + 0 * u, torch.ones(5, 2), [0.0, 1.0], generator=noise)
        >>> solution.states.shape
        torch.Size([2, 5, 2])
    """
    t = _rising(times)
    solver = _method(drift, diffusion, u0, method, rtol, atol, norm, record)
    path = BrownianPath(u0, generator=generator)
    now, u, states, attempts = t[0], u0, [u0], 0
    h = first_step if first_step is not None else _first_step(solver, now, t[-1], u)
    # Defaults of StochasticDiffEq.jl for these methods: order 1.5, growth of at most 9/8.
    control = StepController(1.5, largest=9 / 8)
    for end in t[1:]:
        while now < end:
            attempts += 1
            last = end - now - h <= 1e-10 * h
            length = end - now if last else h
            piece = path.ahead(length)
            done = solver.attempt(now, u, piece)
            error = read_error(done.error, time=now, h=length, state=u)
            if error > 1.0:
                solver.statistics.rejected += 1
                h = control.rejected(length, error)
            else:
                solver.statistics.accept(length, done.error, done.last)
                path.advance(length)
                now, u = end if last else now + length, done.state
                # A step that was shortened to end at a time says nothing against the longer one.
                h = max(control.accepted(length, error), h if last else 0.0)
            if now < t[-1]:
                check_progress(attempts, max_steps, time=now, h=h, error=error)
        states.append(u)
    return Solution(torch.stack(states), solver.statistics)


def sdeint_on_grid(
    drift: Field,
    diffusion: Field,
    u0: Tensor,
    grid: Sequence[float] | Tensor,
    *,
    increments: Sequence[Increment] | None = None,
    method: str = "sosri",
    rtol: float = 0.01,
    atol: float = 0.01,
    norm: Norm = "batch",
    generator: torch.Generator | None = None,
    record: bool = True,
) -> Solution:
    """Solve a stochastic equation with the steps of a given grid; nothing is read from the device.

    Args:
        drift: as in :func:`sdeint`, as all that is not explained here.
        diffusion: one coefficient for each entry of u.
        u0: state at the first time.
        grid: T >= 2 rising times; each is the end of a step.
        increments: T - 1 pieces of the path that drives it; default drawn.
        method: ``"sosri"`` or ``"sosri2"``.
        rtol: scales the errors only.
        atol: scales the errors only.
        norm: ``"batch"`` or ``"sample"``.
        generator: source of the noise where there are no increments.
        record: keep errors and stiffness with their graph.

    Returns:
        States at the times of the grid, and the statistics of all steps.

    Raises:
        ValueError: not one increment a step, or as in :func:`sdeint`.

    Examples:
        >>> still = [Increment(0.5, torch.zeros(1), torch.zeros(1))] * 2
        >>> solution = sdeint_on_grid(
        ...     lambda t, u: u, lambda t, u: 0 * u, torch.ones(1), [0.0, 0.5, 1.0], increments=still
        ... )
        >>> round(float(solution.states[-1]), 1)
        2.7
    """
    t = _rising(grid)
    solver = _method(drift, diffusion, u0, method, rtol, atol, norm, record)
    if increments is not None and len(increments) != len(t) - 1:
        raise ValueError(f"a grid of {len(t)} times needs {len(t) - 1} increments, got {len(increments)}")
    path = BrownianPath(u0, generator=generator)
    u, states = u0, [u0]
    for number, (now, reached) in enumerate(pairwise(t)):
        if increments is None:
            piece = path.ahead(reached - now)
            path.advance(reached - now)
        else:
            piece = increments[number]._replace(length=reached - now)
        done = solver.attempt(now, u, piece)
        solver.statistics.accept(reached - now, done.error, done.last)
        u = done.state
        states.append(u)
    return Solution(torch.stack(states), solver.statistics)


@torch.no_grad()
def _first_step(solver: _Method, now: float, end: float, u: Tensor) -> float:
    """A hundredth of the time in which drift or three deviations of the noise change the state by its tolerance's size.

    Ours, in the manner of the rule for ordinary equations; one number is read.
    """
    solver.statistics.evaluations += 1
    f, g = evaluate(solver.drift, now, u), solver.noise(now, u)
    scale = u.abs() * solver.rtol + solver.atol
    fastest = torch.linalg.vector_norm((f.abs() + 3.0 * g.abs()) / scale) * (u.numel() ** -0.5)
    size = torch.linalg.vector_norm(u / scale) * (u.numel() ** -0.5)
    h = float(0.01 * size.clamp(min=1.0) / fastest)
    if math.isnan(h):
        raise RuntimeError(f"drift or diffusion are not finite at t = {now:.6g}; check the inputs and the weights")
    return min(max(h, 1e-6 * (end - now)), end - now)
