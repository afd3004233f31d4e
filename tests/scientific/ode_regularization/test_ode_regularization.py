"""Solvers with differentiable errors: order, gradients, closed forms, noise, and the penalty.

Golden vectors and bad inputs are in the contract suite. Each test names the fault that makes it fail.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from regularized.scientific.ode_regularization import solver_statistics
from regularized.scientific.ode_regularization.layer import NeuralODE, NeuralSDE
from regularized.scientific.ode_regularization.local import LocalNeuralODE
from regularized.scientific.ode_regularization.ode_solver import odeint, odeint_on_grid
from regularized.scientific.ode_regularization.ode_tableaus import PAIRS
from regularized.scientific.ode_regularization.penalty import solver_penalty
from regularized.scientific.ode_regularization.sde_solver import BrownianPath, Increment, sdeint, sdeint_on_grid
from regularized.scientific.ode_regularization.sde_tableaus import STOCHASTIC
from regularized.scientific.ode_regularization.step_control import IntegralController, StepController
from regularized.scientific.ode_regularization.term import SolverRegularization, exponential_decay
from regularized.training import Batch, Objective, Progress, Step, Term

METHODS = ("tsit5", "dopri5", "bosh3")
DOUBLE = torch.float64


def swing(t, u):
    """A smooth field that depends on time; linear in u, so that scipy solves it to the last digits."""
    return torch.stack([u[..., 1], -4.0 * u[..., 0] + t.cos()], dim=-1)


def exact_swing(u0, times):
    solution = solve_ivp(
        lambda t, u: [u[1], -4 * u[0] + math.cos(t)],
        (times[0], times[-1]),
        u0,
        t_eval=times,
        method="DOP853",
        rtol=1e-13,
        atol=1e-13,
    )
    return torch.tensor(solution.y.T)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_solution_and_error(method):
    """Halving the step divides the end's error by 2^p and h EEst by 2^(p+1): fails for any wrong coefficient."""
    u0, order = torch.tensor([[1.0, 0.5]], dtype=DOUBLE), PAIRS[method].order
    truth = exact_swing([1.0, 0.5], [0.0, 1.0])[-1]
    ends, errors = [], []
    for steps in (16, 32):
        solution = odeint_on_grid(swing, u0, torch.linspace(0, 1, steps + 1, dtype=DOUBLE), method=method)
        ends.append(float((solution.states[-1, 0] - truth).norm()))
        errors.append(float(solution.statistics.errors_times_steps[0]))
    assert math.log2(ends[0] / ends[1]) == pytest.approx(order, abs=0.35)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.35)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [[0.0, 0.13, 0.5, 0.51, 2.0], [2.0, 1.1, 0.2]])
def test_dense_output_and_direction(method, times):
    """States between the steps, forward and backward in time: fails for a wrong interpolant or a sign of h."""
    u0 = exact_swing([1.0, 0.5], [0.0, times[0]])[-1] if times[0] else torch.tensor([1.0, 0.5], dtype=DOUBLE)
    solution = odeint(swing, u0[None], times, method=method, rtol=1e-7, atol=1e-7)
    truth = [exact_swing([1.0, 0.5], [0.0, t])[-1] if t else torch.tensor([1.0, 0.5], dtype=DOUBLE) for t in times]
    torch.testing.assert_close(solution.states[:, 0], torch.stack(truth), rtol=0, atol=2e-5)
    ends = odeint(swing, u0[None], [times[0], times[-1]], method=method, rtol=1e-7, atol=1e-7)
    assert ends.statistics.step_sizes == solution.statistics.step_sizes
    assert torch.equal(ends.states[-1], solution.states[-1])
    assert min(solution.statistics.step_sizes) > 0


def test_a_single_time_is_the_start():
    """As in torchdiffeq: shape (1, ...), no call of f, gradients to u0. Fails where the states share u0's memory."""
    u0 = torch.randn(3, 2, dtype=DOUBLE, requires_grad=True)
    solution = odeint(lambda t, u: pytest.fail("there is nothing to solve"), u0, [0.7])
    assert torch.equal(solution.states, u0[None])
    assert (solution.statistics.evaluations, solution.statistics.step_sizes) == (0, [])
    (gradient,) = torch.autograd.grad(solution.states.sum(), u0)
    assert torch.equal(gradient, torch.ones_like(u0))
    assert solution.states.data_ptr() != u0.data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_interpolant_ends_in_the_solution(method):
    """The interpolant's weights at the end are those of the solution: fails for a wrong digit in it."""
    pair = PAIRS[method]
    np.testing.assert_allclose([sum(row) for row in pair.dense], [*pair.a[-1], 0.0], atol=1e-13)


def test_constant_field_has_no_error():
    """Sum of the error's weights is 0, and 0 / 0 in the stiffness is 0, in value and gradient."""
    for speed in (0.0, 1.5):
        c = torch.tensor(speed, dtype=DOUBLE, requires_grad=True)
        solution = odeint(lambda t, u, c=c: c.expand_as(u), torch.ones(3, 2, dtype=DOUBLE), [0.0, 1.0])
        for penalty in [solver_penalty(solution.statistics, kind=kind) for kind in ("error", "stiffness")]:
            assert float(penalty.detach()) == pytest.approx(0.0, abs=1e-9)
            assert torch.isfinite(torch.autograd.grad(penalty, c, retain_graph=True)[0])


@pytest.mark.parametrize("method", ["tsit5", "dopri5"])
def test_stiffness_of_a_linear_field_is_its_eigenvalue(method):
    """abs L for every step, with gradient sign L: fails for swapped stages, and for a missing stability size."""
    size = {"tsit5": 3.5068, "dopri5": 3.3066}[method]
    for value in (-3.0, 0.5):
        rate = torch.tensor(value, dtype=DOUBLE, requires_grad=True)
        solution = odeint(lambda t, u, r=rate: r * u, torch.ones(2, 2, dtype=DOUBLE), [0.0, 1.0], method=method)
        factors = {"mean": 1, "max": 1, "sum": len(solution.statistics.step_sizes)}
        penalties = [solver_penalty(solution.statistics, kind="stiffness", reduction=how) for how in factors]
        for penalty, factor in zip(penalties, factors.values(), strict=True):
            (gradient,) = torch.autograd.grad(penalty, rate, retain_graph=True)
            assert float(penalty.detach()) == pytest.approx(factor * abs(value) / size, rel=1e-6)
            assert float(gradient) == pytest.approx(factor * math.copysign(1, value) / size, rel=1e-4)


def test_error_of_powers_of_time():
    """The embedded solution integrates t^3 exactly and t^7 not: fails for a wrong embedded order."""
    for power, zero in ((0, True), (3, True), (7, False)):
        solution = odeint_on_grid(
            lambda t, u, p=power: (t**p).expand_as(u), torch.zeros(1, 1, dtype=DOUBLE), [0.0, 1.0]
        )
        assert (float(solution.statistics.errors[0]) < 1e-8) == zero


def test_errors_scale_with_the_tolerance():
    """On a frozen grid, tolerances times s divide every error by s; the states do not move."""
    u0 = torch.tensor([[1.0, 0.5], [0.2, -1.0]], dtype=DOUBLE)
    one, two = (odeint_on_grid(swing, u0, [0.0, 0.3, 1.0], rtol=s * 1e-4, atol=s * 1e-5) for s in (1.0, 4.0))
    torch.testing.assert_close(one.statistics.errors, 4.0 * two.statistics.errors, rtol=1e-12, atol=0)
    assert torch.equal(one.states, two.states)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_accepted_grid(recompute):
    """Against finite differences on the accepted steps: fails for a detached stage, or a graph through step sizes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    u0 = torch.randn(3, 2, dtype=DOUBLE, requires_grad=True)
    solution = odeint(
        lambda t, u: 9 * net(u), u0, [0.0, 1.0], rtol=1e-3, atol=1e-3, recompute=recompute, first_step=1.0
    )
    assert solution.statistics.rejected > 0
    sizes = solution.statistics.step_sizes
    grid = [0.0, *np.cumsum(sizes)]

    def value(statistics, states):
        kinds = [solver_penalty(statistics, kind=kind, reduction="sum") for kind in ("error", "stiffness", "both")]
        return states[-1].square().sum() + sum(kinds)

    (ours,) = torch.autograd.grad(value(solution.statistics, solution.states), u0)

    def frozen(u):
        s = odeint_on_grid(lambda t, v: 9 * net(v), u, grid, rtol=1e-3, atol=1e-3)
        return value(s.statistics, s.states)

    direction = torch.randn_like(u0)
    with torch.enable_grad():
        ahead, behind = (float(frozen((u0 + s * direction).detach().requires_grad_()).detach()) for s in (1e-6, -1e-6))
    assert float((ours * direction).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("norm", ["batch", "sample"])
@pytest.mark.parametrize("method", [*METHODS, "sosri"])
def test_error_has_a_backward_pass_of_its_own(monkeypatch, method, norm):
    """What large states take, against autograd's own chain. Fails when a weight, the scale or the norm loses its part
    of the gradient; rows and entries in which nothing moves must not make it NaN."""
    weight = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True)
    u0 = torch.randn(4, 3, dtype=DOUBLE)
    u0[1] = 0.0
    u0.requires_grad_()
    grid, found = [0.0, 1.0, 2.5], []  # long steps: of short ones rounding is a part of the error
    for smallest in (10**9, 0):
        monkeypatch.setattr(solver_statistics, "OWN_BACKWARD_FROM", smallest)
        field = lambda t, u: torch.tanh(u @ weight) * u  # noqa: E731
        if method == "sosri":
            noise = torch.Generator().manual_seed(0)
            solution = sdeint_on_grid(field, lambda t, u: 0.1 * u, u0, grid, norm=norm, generator=noise)
        else:
            solution = odeint_on_grid(field, u0, grid, method=method, norm=norm)
        errors = solution.statistics.errors
        found.append((errors, torch.autograd.grad((errors * (1 + errors)).sum(), (u0, weight), retain_graph=True)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-8, atol=1e-8)


def test_error_of_large_states_can_be_differentiated_twice(monkeypatch):
    """Fails when the second backward pass takes the local error, the scale or the value for constants."""
    monkeypatch.setattr(solver_statistics, "OWN_BACKWARD_FROM", 0)
    u0 = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True)

    def errors(u, w):
        return odeint_on_grid(lambda t, v: torch.tanh(v @ w), u, [0.0, 0.8], rtol=1e-2, atol=1e-2).statistics.errors

    assert torch.autograd.gradcheck(errors, (u0, weight))
    assert torch.autograd.gradgradcheck(errors, (u0, weight))


def test_sample_norm_adds_up():
    """One error a row: two halves of a batch give its parts. Fails for a norm over the whole batch."""
    u0 = torch.randn(4, 2, dtype=DOUBLE)
    grid = [0.0, 0.5, 1.0]
    whole = odeint_on_grid(swing, u0, grid, norm="sample").statistics
    parts = [odeint_on_grid(swing, part, grid, norm="sample").statistics for part in u0.split(2)]
    torch.testing.assert_close(whole.errors, torch.cat([p.errors for p in parts], dim=1))
    torch.testing.assert_close(solver_penalty(whole), sum(solver_penalty(p) for p in parts) / 2)
    batch = odeint_on_grid(swing, u0, grid).statistics
    torch.testing.assert_close(batch.errors, whole.errors.square().mean(dim=1).sqrt())


def test_penalties_are_what_the_paper_defines():
    """Sums, means and maxima of E h and S / size, and 0.1 of the latter in both: written out again."""
    statistics = odeint(swing, torch.ones(2, 2, dtype=DOUBLE), [0.0, 3.0], rtol=1e-4, atol=1e-4).statistics
    e = [float(error) * h for error, h in zip(statistics.errors, statistics.step_sizes, strict=True)]
    s = [float(stiffness) / 3.5068 for stiffness in statistics.stiffness]
    both = [a + 0.1 * b for a, b in zip(e, s, strict=True)]
    for kind, values in (("error", e), ("stiffness", s), ("both", both)):
        for reduction, of in (("mean", np.mean), ("sum", sum), ("max", max)):
            assert float(solver_penalty(statistics, kind=kind, reduction=reduction)) == pytest.approx(of(values))


def test_counters():
    """Calls of f are counted one by one, rejected attempts and the first step size with them."""
    calls = []

    def f(t, u):
        calls.append(float(t))
        return 5.0 * (8.0 * t).cos() * u

    statistics = odeint(f, torch.ones(1, 1), [0.0, 2.0], rtol=1e-4, atol=1e-4, first_step=1.0).statistics
    assert statistics.evaluations == len(calls) == 1 + 6 * (len(statistics.step_sizes) + statistics.rejected)
    assert sum(statistics.step_sizes) == pytest.approx(2.0)
    assert statistics.rejected > 0
    assert float(statistics.errors.max()) <= 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_the_same_without_a_graph(method, norm):
    """Sums in the buffer are the chains' sums, in the steps and between them; nothing that is handed out lies in it.

    Fails for a wrong row of weights, stages of the step before, a state or an input of f that a later step overwrites.
    """
    u0 = torch.randn(2, 3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).transpose(0, 2)
    seen = []

    def f(t, u):
        if not torch.is_grad_enabled():
            seen.append((t, u, t.clone(), u.clone()))
        return 8.0 * (9.0 * t).cos() * u.sin()

    def solve():
        return odeint(f, u0, [1.0, 0.7, 0.65, 0.0], method=method, norm=norm, rtol=1e-5, atol=1e-5, first_step=0.5)

    graph = solve()
    with torch.no_grad():
        plain = solve()
    assert graph.statistics.rejected > 0
    torch.testing.assert_close(plain.states, graph.states, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plain.statistics.errors, graph.statistics.errors, rtol=1e-6, atol=1e-9)
    assert plain.statistics.evaluations == graph.statistics.evaluations == len(seen)
    assert all(torch.equal(t, t0) and torch.equal(u, u0) for t, u, t0, u0 in seen)


def _problems():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    return {
        "network": (net, lambda t, u: 4.0 * net(u) * (1 + t), torch.randn(8, 4, dtype=DOUBLE), 1.0),
        "swing": (None, swing, torch.tensor([[1.0, 0.5]], dtype=DOUBLE), 5.0),
        "chirp": (None, lambda t, u: 5.0 * (8.0 * t).cos() * u, torch.ones(1, 1, dtype=DOUBLE), 4.0),
    }


def _counted(solve, f, u0, times, tolerance):
    """State at the end, and how often f was called."""
    calls = [0]

    def counting(t, u):
        calls[0] += 1
        return f(t, u)

    states = solve(counting, u0, torch.tensor(times, dtype=DOUBLE), rtol=tolerance, atol=tolerance, method="dopri5")
    return (states if isinstance(states, torch.Tensor) else states.states), calls[0]


TOLERANCES = [10 ** -(k / 2) for k in range(10, 19)]


@functools.cache
def _of_torchdiffeq(name):
    """What torchdiffeq gives for a problem at each tolerance, and how often it calls for that."""
    theirs = pytest.importorskip("torchdiffeq", reason="a competitor; pip install torchdiffeq==0.2.5")
    _, f, u0, end = _problems()[name]
    with torch.no_grad():
        return [_counted(theirs.odeint, f, u0, [0.0, end], tolerance) for tolerance in TOLERANCES]


def test_against_torchdiffeq():
    """Solution, gradient and evaluations at equal tolerance, with the same control of the step size.

    Fails for a wasteful first or last step, a stage computed twice, or another norm or power of the error. A single
    tolerance may differ by the one step that a threshold decides about; all together must not.
    """
    theirs = pytest.importorskip("torchdiffeq", reason="a competitor; pip install torchdiffeq==0.2.5")
    net, f, u0, _ = _problems()["network"]
    ours = functools.partial(odeint, controller="integral")
    results = []
    for solve in (ours, theirs.odeint):
        states, calls = _counted(solve, f, u0, [0.0, 0.4, 1.0], 1e-8)
        results.append((states, torch.autograd.grad(states.square().sum(), net[0].weight)[0], calls))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    assert results[0][2] <= 1.1 * results[1][2]
    with torch.no_grad():
        for name, (_, f, u0, end) in _problems().items():
            one = [_counted(ours, f, u0, [0.0, end], tolerance)[1] for tolerance in TOLERANCES]
            other = [calls for _, calls in _of_torchdiffeq(name)]
            assert sum(one) <= 1.02 * sum(other)
            assert all(a <= 1.1 * b + 6 for a, b in zip(one, other, strict=True))


def test_fewer_evaluations_than_torchdiffeq_at_equal_error():
    """The default control of the step size costs less for what it reaches: lines through log evaluations, log error.

    Fails where the default takes more evaluations at equal error, on any of the problems or on the whole.
    """
    ratios = []
    with torch.no_grad():
        for name, (_, f, u0, end) in _problems().items():
            truth = odeint(f, u0, [0.0, end], rtol=1e-12, atol=1e-12).states[-1]
            lines, ranges = [], []
            ours = [_counted(odeint, f, u0, [0.0, end], tolerance) for tolerance in TOLERANCES]
            for runs in (ours, _of_torchdiffeq(name)):
                errors = np.log([float((states[-1] - truth).norm()) for states, _ in runs])
                lines.append(np.polyfit(errors, np.log([calls for _, calls in runs]), 1))
                ranges.append((errors.min(), errors.max()))
            shared = np.linspace(max(low for low, _ in ranges), min(high for _, high in ranges), 9)
            ratios.append(np.exp(np.mean(np.polyval(lines[0], shared) - np.polyval(lines[1], shared))))
    assert max(ratios) <= 1.0
    assert np.exp(np.mean(np.log(ratios))) <= 0.95


def test_control_of_the_step_size_by_hand():
    """Both rules written out, with their limits. Fails for another power, or another memory of the step before."""
    pi, h = StepController(5), 0.1
    assert pi.accepted(h, 0.5) == pytest.approx(h * 0.9 * 1e-4**0.08 / 0.5**0.14)
    assert pi.accepted(h, 0.7) == pytest.approx(h * 0.9 * 0.5**0.08 / 0.7**0.14)
    assert pi.accepted(h, 0.0) == pytest.approx(10 * h)
    assert pi.rejected(h, 3.0) == pytest.approx(h * 0.9 / 3**0.14)
    assert pi.rejected(h, 1e9) == pytest.approx(0.2 * h)
    integral = IntegralController(5)
    assert integral.accepted(h, 0.2) == pytest.approx(h * 0.9 / 0.2**0.2)
    assert (integral.accepted(h, 0.99), integral.accepted(h, 1e-9)) == pytest.approx((h, 10 * h))
    assert integral.rejected(h, 3.0) == pytest.approx(h * 0.9 / 3**0.2)
    assert integral.rejected(h, 1e9) == pytest.approx(0.2 * h)


@pytest.mark.parametrize("ends", [(0.0, 3.0), (3.0, 0.0)])
@pytest.mark.parametrize("start", [(1.0, 0.5), (0.0, 0.0), (0.0, 1.0)], ids=["slope", "zero", "curvature"])
def test_first_step_by_hand(ends, start):
    """The rule of the first step in NumPy. Fails for another power, sign, or scale in it."""
    u0, rtol, atol = np.array(start), 1e-4, 1e-5

    def f(t, u):
        return np.array([u[1], -400.0 * u[0] + math.cos(t)])

    def tensors(t, u):
        return torch.stack([u[1], -400.0 * u[0] + t.cos()])

    def rms(x):
        return float(np.sqrt(np.mean(x**2)))

    k, size = f(ends[0], u0), atol + rtol * abs(u0)
    d0, d1 = rms(u0 / size), rms(k / size)
    h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    sign = math.copysign(1.0, ends[1] - ends[0])
    d2 = rms((f(ends[0] + sign * h0, u0 + sign * h0 * k) - k) / size) / h0
    first = min(100 * h0, (0.01 / max(d1, d2)) ** (1 / 6))
    statistics = odeint(tensors, torch.tensor(u0), ends, method="dopri5", rtol=rtol, atol=atol).statistics
    assert statistics.step_sizes[0] == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("rate", [2.0, -2.0])
def test_scale_of_the_error(rate):
    """An error is relative to the larger of both ends of the step, whether it grows or decays."""
    solve = functools.partial(odeint_on_grid, lambda t, u: rate * u, torch.ones(1, 1, dtype=DOUBLE), [0.0, 1.0])
    scaled, plain = solve(rtol=1e-4, atol=1e-5), solve(rtol=0.0, atol=1.0)
    size = 1e-5 + 1e-4 * max(1.0, float(plain.states[-1]))
    assert float(scaled.statistics.errors[0]) == pytest.approx(float(plain.statistics.errors[0]) / size)


# -- stochastic ---------------------------------------------------------------------------------


def test_bridge_keeps_the_law():
    """Cut at many places, pieces have the moments of a Brownian path and its integral, whatever was looked at before.

    Fails for a bridge that forgets the area, or that draws a rejected increment anew.
    """
    n = 200_000
    path = BrownianPath(torch.zeros(n, dtype=DOUBLE), generator=torch.Generator().manual_seed(0))
    whole = path.ahead(2.0)
    seen = path.ahead(1.2), path.ahead(0.5)
    pieces = []
    for h in (0.5, 0.4, 0.9, 0.2):
        pieces.append(path.ahead(h))
        path.advance(h)
    torch.testing.assert_close(pieces[0].increment, seen[1].increment)
    increments = sum(p.increment for p in pieces)
    torch.testing.assert_close(increments, whole.increment)
    area, before = torch.zeros(n, dtype=DOUBLE), torch.zeros(n, dtype=DOUBLE)
    for p in pieces:
        area, before = area + p.area + before * p.length, before + p.increment
    torch.testing.assert_close(area, whole.area)
    columns = torch.stack([x for p in pieces for x in (p.increment / p.length**0.5, p.area / p.length**1.5)])
    expected = torch.block_diag(*[torch.tensor([[1.0, 0.5], [0.5, 1 / 3]], dtype=DOUBLE)] * len(pieces))
    torch.testing.assert_close(columns @ columns.T / n, expected, rtol=0, atol=0.012)


@pytest.mark.parametrize("method", list(STOCHASTIC))
def test_strong_order(method):
    """Geometric Brownian motion on one path, coarse and fine: order about 1.5: fails for a wrong integral of noise."""
    paths, drift, noise = 1000, 0.5, 0.6
    generator = torch.Generator().manual_seed(0)
    fine = 64
    draws = torch.randn(2, fine, paths, 1, dtype=DOUBLE, generator=generator)
    h = 1 / fine
    pieces = [
        Increment(h, w * h**0.5, (w + z / 3**0.5) * (0.5 * h**1.5)) for w, z in zip(draws[0], draws[1], strict=True)
    ]
    end = sum(p.increment for p in pieces)
    truth = torch.exp((drift - noise**2 / 2) + noise * end)
    errors = []
    for steps in (8, 32):
        share = fine // steps
        coarse = []
        for n in range(steps):
            total = pieces[n * share]
            for p in pieces[n * share + 1 : (n + 1) * share]:
                area = total.area + p.area + total.increment * h
                total = Increment(total.length + h, total.increment + p.increment, area)
            coarse.append(total)
        solution = sdeint_on_grid(
            lambda t, u: drift * u,
            lambda t, u: noise * u,
            torch.ones(paths, 1, dtype=DOUBLE),
            torch.linspace(0, 1, steps + 1, dtype=DOUBLE),
            increments=coarse,
            method=method,
        )
        errors.append(float((solution.states[-1] - truth).abs().mean()))
    assert 1.2 < math.log2(errors[0] / errors[1]) / 2 < 1.9


def test_adaptive_noise_is_unbiased():
    """Mean and variance of an Ornstein-Uhlenbeck process with many rejections; fails where rejecting picks the path."""
    n = 20_000
    solution = sdeint(
        lambda t, u: -u,
        lambda t, u: 0.5 + 0 * u,
        torch.ones(n, 1, dtype=DOUBLE),
        [0.0, 0.5, 1.0],
        rtol=2e-3,
        atol=2e-3,
        first_step=0.5,
        generator=torch.Generator().manual_seed(0),
        record=False,
    )
    assert solution.statistics.rejected > 0
    end = solution.states[-1]
    variance = 0.25 * (1 - math.exp(-2)) / 2
    assert float(end.mean()) == pytest.approx(math.exp(-1), abs=4 * (variance / n) ** 0.5)
    assert float(end.var()) == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


def test_stochastic_without_noise_is_ordinary():
    """Diffusion 0: the solution of the ordinary equation, and SOSRI2's estimate is the eigenvalue."""
    u0 = torch.ones(2, 2, dtype=DOUBLE)
    solution = sdeint(lambda t, u: -2 * u, lambda t, u: 0 * u, u0, [0.0, 1.0], method="sosri2", rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(solution.states[-1], u0 * math.exp(-2), rtol=1e-3, atol=0)
    torch.testing.assert_close(solution.statistics.stiffness, torch.full_like(solution.statistics.stiffness, 2.0))


# -- layers and term ----------------------------------------------------------------------------


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, u):
        return torch.tanh(self.linear(u))


def test_layers_train_copy_and_evaluate():
    """Fails for statistics that hinder a copy, an eval pass with a graph for errors, or another solution in eval."""
    torch.manual_seed(0)
    for layer in (NeuralODE(Field()), NeuralODE(Field(), backprop="checkpoint"), NeuralSDE(Field(), Field(), steps=3)):
        x = torch.randn(4, 3)
        torch.manual_seed(1)
        out = layer(x)
        (out.square().mean() + solver_penalty(layer.statistics)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        twin = copy.deepcopy(layer).eval()
        torch.manual_seed(1)
        torch.testing.assert_close(twin(x), out)
        assert not twin.statistics.errors.requires_grad
        assert list(twin.state_dict()) == list(layer.state_dict())


def test_the_term_adds_up_layers():
    """The term is the batch's size times the sum over layers, so that Objective's division gives the sum."""
    model = nn.Sequential(NeuralODE(Field()), NeuralODE(Field()))
    batch = Batch.of(torch.randn(5, 3))

    class Task(Term):
        def forward(self, step):
            return step.output.square().sum()

    objective = Objective({"task": Task(), "solver": SolverRegularization(weight=2.0)})
    step = Step(model, batch, Progress(0, 1))
    loss = objective.loss(step, objective.counts([batch]))
    penalties = sum(solver_penalty(layer.statistics) for layer in model)
    torch.testing.assert_close(loss, step.output.square().sum() / 5 + 2.0 * penalties)


def test_annealing():
    """From start in the first epoch to end after the last, straight on a logarithmic scale."""
    decay = exponential_decay(100.0, 10.0)
    values = [decay(Progress(0, 1, epoch, 75)) for epoch in range(76)]
    assert values[0] == 100.0
    assert values[75] == pytest.approx(10.0)
    np.testing.assert_allclose(np.diff(np.log(values)), -math.log(10) / 75)


def test_it_makes_dynamics_cheaper():
    """What it is for: the same fit with fewer evaluations. Fails for a penalty with a flipped sign or no gradient."""
    evaluations = []
    for weight in (0.0, 30.0):
        torch.manual_seed(0)
        layer = NeuralODE(nn_field := Field(), rtol=1e-7, atol=1e-7).double()
        with torch.no_grad():
            nn_field.linear.weight.mul_(4.0)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        x = torch.randn(16, 3, dtype=DOUBLE)
        for _ in range(15):
            loss = (layer(x).mean(dim=0) - x.mean(dim=0)).square().sum()
            if weight:
                loss = loss + weight * solver_penalty(layer.statistics)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        evaluations.append(layer.statistics.evaluations)
    assert evaluations[1] < 0.8 * evaluations[0]


def test_layers_give_up_before_memory_does():
    """Fails when a layer keeps the graph of ten thousand steps of dynamics that blew up: its limit is not passed on."""

    def wild(t, u):
        return 50 * (50 * t).sin() * u

    u = torch.ones(2, 3)
    layers = [
        NeuralODE(wild, max_steps=3),
        LocalNeuralODE(wild, max_steps=3),
        NeuralSDE(wild, lambda t, u: 5 * u, rtol=1e-3, atol=1e-3, max_steps=3),
    ]
    for layer in layers:
        with pytest.raises(RuntimeError, match="max_steps=3"):
            layer(u)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        NeuralODE(wild, max_steps=0)


@pytest.mark.parametrize("solve", [odeint, odeint_on_grid])
def test_what_has_no_gradient_or_no_shape_is_refused(solve):
    """Fails when times that want a gradient silently get none, or a tuple of states ends in an AttributeError."""
    times = torch.tensor([0.0, 1.0], requires_grad=True)
    with pytest.raises(ValueError, match=r"times get no gradient.*times\.detach\(\)"):
        solve(swing, torch.ones(2), times)
    assert torch.equal(solve(swing, torch.ones(2), times.detach()).states, solve(swing, torch.ones(2), [0, 1]).states)
    with torch.no_grad():
        assert solve(swing, torch.ones(2), times).states.isfinite().all()
    with pytest.raises(TypeError, match=r"one tensor, got tuple.*torch\.cat"):
        solve(lambda t, u: u, (torch.ones(2), torch.ones(2)), [0.0, 1.0])


def test_an_end_time_is_learnt_as_the_page_says():
    """Fails when the remedy that the error names gives another derivative than f at the end."""
    end = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    u0 = torch.tensor([1.0, 0.5], dtype=DOUBLE)
    last = odeint(lambda s, u: end * swing(end * s, u), u0, [0.0, 1.0], rtol=1e-10, atol=1e-10).states[-1]
    by_end = torch.stack([torch.autograd.grad(u, end, retain_graph=True)[0] for u in last])
    torch.testing.assert_close(by_end, swing(end, last), rtol=1e-7, atol=1e-7)
