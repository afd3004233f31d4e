"""Adaptive accuracies against exact ones: limits, true bounds, decrease that is real, counting, state."""

import math
import sys

import pytest
import torch

from regularized.evidence.conformance import Case, UnknownCase
from regularized.evidence.experiment import Unavailable, run_arm
from regularized.papers.inexact_bilevel import conformance, experiment
from regularized.scientific.inexact_bilevel.baselines import HOAG, FixedAccuracy
from regularized.scientific.inexact_bilevel.bound import BilevelConstants, EstimatedBound, combine
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.lower_solvers import (
    InnerToleranceNotReached,
    LowerSolution,
    gradient_descent,
)
from regularized.scientific.inexact_bilevel.maid import MAID
from regularized.scientific.inexact_bilevel.official import OfficialMAID


class Quadratic:
    """h = 1/2 ||A2 x + A3 theta - b2||², g = 1/2 ||A1 x - b1||²: everything in closed form."""

    def __init__(self, n: int = 20, m: int = 4, d: int = 3, seed: int = 0) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.A1, self.A2 = (torch.rand(n, m, generator=draws, dtype=torch.float64) for _ in range(2))
        self.A3 = torch.rand(n, d, generator=draws, dtype=torch.float64)
        self.b1, self.b2 = (torch.randn(n, generator=draws, dtype=torch.float64) for _ in range(2))
        self.H, self.C = self.A2.T @ self.A2, self.A2.T @ self.A3
        curvatures = torch.linalg.eigvalsh(self.H)
        self.mu, self.L = float(curvatures[0]), float(curvatures[-1])
        self.constants = BilevelConstants(
            upper=float(torch.linalg.matrix_norm(self.A1, 2)) ** 2,
            cross=float(torch.linalg.matrix_norm(self.C, 2)),
            cross_lipschitz=0.0,
            inverse_lipschitz=0.0,
        )
        self.theta, self.x = torch.ones(d, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)

    def lower(self, x, theta):
        return 0.5 * (self.A2 @ x + self.A3 @ theta - self.b2).square().sum()

    def upper(self, x):
        return 0.5 * (self.A1 @ x - self.b1).square().sum()

    def solution(self, theta):
        return torch.linalg.solve(self.H, self.A2.T @ (self.b2 - self.A3 @ theta))

    def f(self, theta):
        return float(self.upper(self.solution(theta)))

    def gradient(self, theta):
        residual = self.A1.T @ (self.A1 @ self.solution(theta) - self.b1)
        return -self.C.T @ torch.linalg.solve(self.H, residual)

    def maid(self, **options):
        about = {"mu": self.mu, "L": self.L, "bound": "rigorous", "constants": self.constants, **options}
        return MAID(self.lower, self.upper, self.theta, about.pop("x", self.x), **about)


def test_rigorous_bound_holds_and_is_the_formula():
    """Fails when a term of omega is missing or too small: the true error is below it at each accuracy."""
    for seed in range(5):
        problem = Quadratic(seed=seed)
        exact = problem.gradient(problem.theta)
        for eps in (1e-1, 1e-3, 1e-6):
            opt = problem.maid(eps=eps, delta=eps)
            graph = opt.accurate(eps)
            _, at = opt.inexact_gradient(graph, eps)
            omega = opt._bound.omega(at, eps, eps)
            expected = (problem.constants.upper * problem.constants.cross + problem.constants.cross) / problem.mu * eps
            assert omega == pytest.approx(expected, rel=1e-12)
            assert float((at.z - exact).norm()) <= omega
    # All constants, each in its place.
    one = dict.fromkeys(("upper", "cross", "cross_lipschitz", "inverse_lipschitz"), 0.0)
    about = {"eps": 0.5, "delta": 0.25, "mu": 2.0, "upper_gradient": 3.0}
    assert combine(**about, **{**one, "cross": 8.0}) == 8.0 / 2.0 * 0.25
    assert combine(**about, **{**one, "cross": 8.0, "upper": 4.0}) == 1.0 + 4.0 * 8.0 / 2.0 * 0.5
    assert combine(**about, **{**one, "cross": 8.0, "inverse_lipschitz": 5.0}) == 1.0 + 5.0 * 3.0 * 8.0 * 0.5
    assert combine(**about, **{**one, "cross_lipschitz": 6.0}) == 6.0 * 3.0 / 2.0 * 0.5
    assert combine(**about, **{**one, "cross_lipschitz": 6.0, "upper": 4.0}) == 4.5 + 6.0 * 4.0 / 2.0 * 0.25
    assert combine(**about, **one, direct_lipschitz=7.0) == 3.5


def test_exact_accuracies_are_gradient_descent_with_armijo():
    """Fails when the step grows by another factor, trial steps shrink by another, or decrease is asked otherwise."""
    problem = Quadratic()
    opt = problem.maid(eps=1e-10, delta=1e-10, step=1.0, eta=0.3, nu=1.0, rho=0.4, growth=1.5, max_inner=20_000)
    theta, step = problem.theta, 1.0
    for _ in range(12):
        z = problem.gradient(theta)
        a = next(
            step * 0.4**i
            for i in range(100)
            if problem.f(theta - step * 0.4**i * z) - problem.f(theta) <= -0.3 * step * 0.4**i * float(z @ z)
        )
        theta, step = theta - a * z, 1.5 * a
        info = opt.step()
        assert info.status == "descended"
        assert info.step_size == pytest.approx(a)
        torch.testing.assert_close(opt.theta, theta, rtol=1e-6, atol=1e-8)
        assert info.loss == pytest.approx(problem.f(theta), rel=1e-7)


@pytest.mark.parametrize("eps", [1e-1, 1e-3])
def test_accepted_steps_really_decrease(eps):
    """Fails when a sign in the line search's errors is wrong: f falls by eta a ||z||², and -z leads downhill."""
    for seed in range(3):
        problem = Quadratic(seed=seed)
        opt = problem.maid(eps=eps, delta=eps, step=1.0, eta=0.2, nu=1.25)
        theta = problem.theta
        for info in (opt.step() for _ in range(15)):
            now = opt.theta
            if info.status == "descended":
                assert problem.f(now) <= problem.f(theta) - 0.2 * info.step_size * info.gradient_norm**2 + 1e-12
                assert info.bound <= 0.8 * info.gradient_norm
                z = (theta - now) / info.step_size
                assert float(z @ problem.gradient(theta)) >= 0.2 * float(z @ z) * (1 - 1e-6)
                assert abs(info.loss - problem.f(now)) <= info.loss_error
            else:
                assert torch.equal(now, theta)
            theta = now


def test_accuracies_are_tightened_and_loosened():
    """Fails when eps or delta keeps its value, or failures do not add trial steps."""
    problem = Quadratic()
    opt = problem.maid(eps=0.1, delta=0.2, tau=0.25, nu=2.0)
    info = opt.step()
    rounds = round(math.log(info.eps / 0.1, 0.25))
    assert rounds >= 1
    assert (info.eps, info.delta) == pytest.approx((0.1 * 0.25**rounds, 0.2 * 0.25**rounds))
    assert (opt.eps, opt.delta) == pytest.approx((2 * info.eps, 2 * info.delta))
    # No trial step can succeed where eta asks for more than any step gives.
    greedy = problem.maid(eps=1e-3, delta=1e-3, eta=0.999, step=100.0, nu=1.0)
    info = greedy.step()
    assert info.status == "tightened"
    assert greedy.eps == pytest.approx(0.5 * info.eps)
    assert greedy.eps < 1e-3 * 0.5**3
    assert greedy.state_dict()["failures"] == 3


def test_estimated_constants():
    """Fails when a secant is not divided by its length, or a power iteration loses its vector."""
    draws = torch.Generator().manual_seed(3)
    X = torch.randn(30, 5, generator=draws, dtype=torch.float64)
    V = torch.randn(30, 5, generator=draws, dtype=torch.float64)
    theta = torch.randn(5, generator=draws, dtype=torch.float64)

    def lower(w, t):
        return (0.5 * (X @ w - 1.0).square()).sum() + 0.5 * (t.exp() * w.square()).sum() + 0.1 * (w**4).sum()

    opt = MAID(
        lower, lambda w: 0.5 * (V @ w - 1.0).square().sum(), theta, torch.zeros(5, dtype=torch.float64), mu=1.0, L=500.0
    )
    bound = opt._bound
    assert isinstance(bound, EstimatedBound)
    _, at = opt.inexact_gradient(opt.accurate(1e-3), 1e-3)
    for _ in range(150):
        omega = bound.omega(at, 1e-3, 1e-3)
    largest = bound.state_dict()["largest"]
    B = torch.diag(theta.exp() * at.x)
    L_g = float(torch.linalg.matrix_norm(V, 2)) ** 2
    assert bound.upper_lipschitz(at.x, theta) == pytest.approx(L_g, rel=1e-6)
    assert bound._cross_norm(at) == pytest.approx(float(torch.linalg.matrix_norm(B, 2)), rel=1e-6)
    # Along u: B changes by diag(e^theta u), A by 2.4 w u (to first order).
    u = at.graph.gradient / at.graph.gradient.norm()
    assert largest["cross_lipschitz"] == pytest.approx(float((theta.exp() * u * at.q).norm() / at.q.norm()), rel=1e-6)
    assert largest["hessian_lipschitz"] == pytest.approx(float((2.4 * at.x * u * at.q).norm() / at.q.norm()), rel=1e-2)
    size = float(at.upper_gradient.norm())
    assert omega == pytest.approx(
        combine(
            eps=1e-3,
            delta=1e-3,
            mu=1.0,
            upper_gradient=size,
            upper=L_g,
            cross=float(torch.linalg.matrix_norm(B, 2)),
            cross_lipschitz=largest["cross_lipschitz"],
            inverse_lipschitz=largest["hessian_lipschitz"] * float(at.q.norm()) / size,
        ),
        rel=1e-4,
    )
    bound.moved()
    assert set(bound.state_dict()["largest"].values()) == {0.0}


def test_scale_of_the_upper_loss():
    """Fails when something compares g with a number: g times 4, delta times 4, step / 4 decides the same."""
    for bound in ("rigorous", "heuristic"):
        problem = Quadratic()
        scaled = Quadratic()
        scaled.constants = BilevelConstants(
            upper=4 * problem.constants.upper, cross=problem.constants.cross, cross_lipschitz=0.0, inverse_lipschitz=0.0
        )
        given = {"bound": bound} if bound == "rigorous" else {"bound": bound, "constants": None}
        one = problem.maid(step=0.1, **given)
        scaled.upper = lambda x, upper=problem.upper: 4 * upper(x)
        four = scaled.maid(step=0.025, delta=0.4, **given)
        for a, b in ((one.step(), four.step()) for _ in range(8)):
            assert (a.status, a.eps, 4 * a.delta, a.step_size) == pytest.approx(
                (b.status, b.eps, b.delta, 4 * b.step_size)
            )
            assert 4 * a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-9)
        torch.testing.assert_close(one.theta, four.theta)


def test_stationary_start():
    """Fails when the tightening never ends where the gradient is 0."""
    one = torch.ones(3, dtype=torch.float64)
    about = {"mu": 1.0, "L": 1.0, "theta": one, "x": 0 * one}
    opt = MAID(lambda x, t: 0.5 * (x - t).square().sum(), lambda x: 0.5 * (x - 1.0).square().sum(), **about)
    log = opt.run(10)
    assert [info.status for info in log] == ["stationary"]
    problem = Quadratic()
    problem.theta = problem.theta - torch.linalg.lstsq(*_newton(problem)).solution
    log = problem.maid(eps=1e-4, tolerance=1e-5).run(50)
    assert log[-1].status == "stationary"
    assert len(log) < 50


def _newton(problem):
    columns = [problem.gradient(problem.theta + e) - problem.gradient(problem.theta) for e in torch.eye(3).double()]
    return torch.stack(columns, dim=1), problem.gradient(problem.theta)


def test_float32_stagnates_with_a_status():
    """Fails when rounding makes an endless loop or an exception of a run that has come as far as it can."""
    problem = Quadratic()
    for name in ("A1", "A2", "A3", "b1", "b2", "theta", "x"):
        setattr(problem, name, getattr(problem, name).float())
    opt = problem.maid(constants=None, bound="heuristic", max_inner=50_000)
    before = opt.run(2)[-1]
    opt.eps = 1e-9
    (info,) = opt.run(5)
    assert (info.status, info.step_size) == ("stagnated", 0.0)
    assert info.loss == pytest.approx(before.loss, rel=1e-2)


def test_counters_are_gradient_evaluations():
    """Fails when a gradient of the lower objective is taken and not counted, or counted twice."""
    problem = Quadratic()
    calls = []
    lower = problem.lower

    def counted(x, theta):
        calls.append(torch.is_grad_enabled())
        return lower(x, theta)

    problem.lower = counted
    for opt in (
        problem.maid(constants=None, bound="heuristic"),
        HOAG(counted, problem.upper, problem.theta, problem.x, mu=problem.mu, L=problem.L),
        FixedAccuracy(counted, problem.upper, problem.theta, problem.x, mu=problem.mu, L=problem.L),
    ):
        calls.clear()
        log = opt.run(4)
        assert log[-1].inner_iterations == sum(calls)
        assert log[-1].iterations == opt.iterations == log[-1].inner_iterations + log[-1].cg_iterations


def test_budget_ends_a_run():
    """Fails when a line search goes on for ever past the budget."""
    problem = Quadratic()
    opt = problem.maid(eta=0.999, step=100.0)  # no step can succeed
    log = opt.run(budget=300)
    assert 300 <= opt.iterations < 300 + 2000
    assert all(info.status == "tightened" for info in log)
    assert opt.run(budget=opt.iterations) == []


def test_warm_starts():
    """Fails when x or q is thrown away: a step after a loosened accuracy needs few gradients and one product of CG."""
    problem = Quadratic()
    opt = problem.maid(step=1e-7, eps=1e-8, delta=1e-1)
    first, second, third = opt.run(3)
    assert third.inner_iterations - second.inner_iterations < first.inner_iterations / 2
    # The residual of the last q, which is good enough, and the product for z.
    assert third.cg_iterations - second.cg_iterations == 2


def test_direct_dependence_on_theta():
    """Fails when theta's direct part of upper(x, theta) is forgotten in the step or in the bound."""
    problem = Quadratic()

    def upper(x, theta):
        return problem.upper(x) + (theta - x.sum()).square().sum()

    given = BilevelConstants(
        upper=problem.constants.upper + 2 * 3 * 4,
        cross=problem.constants.cross,
        cross_lipschitz=0.0,
        inverse_lipschitz=0.0,
        direct_lipschitz=2.0 * math.sqrt(3 * 4),
    )
    for options in ({"bound": "rigorous", "constants": given}, {"bound": "heuristic"}):
        opt = MAID(
            problem.lower, upper, problem.theta, problem.x, mu=problem.mu, L=problem.L, eps=1e-3, delta=1e-3, **options
        )
        theta = problem.theta.clone().requires_grad_()
        exact = torch.autograd.grad(upper(problem.solution(theta), theta), theta)[0]
        _, at = opt.inexact_gradient(opt.accurate(1e-3), 1e-3)
        error = float((at.z - exact).norm())
        assert error <= opt._bound.omega(at, 1e-3, 1e-3)
        assert error < 0.05 * float(exact.norm())
        found = opt._bound.state_dict().get("largest", {}).get("direct_lipschitz")
        assert found is None or 0.0 < found <= given.direct_lipschitz * (1 + 1e-9)
    missing = BilevelConstants(upper=1.0, cross=1.0, cross_lipschitz=0.0, inverse_lipschitz=0.0)
    with pytest.raises(ValueError, match="direct_lipschitz"):
        MAID(problem.lower, upper, problem.theta, problem.x, mu=1.0, L=1.0, bound="rigorous", constants=missing)


def test_nonconvex_upper_loss_asks_for_more():
    """Fails when convex=False does not subtract L_g / 2 eps² from the old value."""
    problem = Quadratic()
    outcomes = {}
    for convex in (True, False):
        opt = problem.maid(eps=1e-2, delta=1e-6, convex=convex, step=1e-4)
        graph = opt.accurate(opt.eps)
        loss, at = opt.inexact_gradient(graph, opt.delta)
        # The largest value at the old point with which the first trial step is still accepted.
        outcomes[convex] = [opt._line_search(loss + shift, at, problem.constants.upper) for shift in (0.0, 10.0)]
        high, low = 10.0, 0.0
        for _ in range(50):
            middle = 0.5 * (high + low)
            found = opt._line_search(loss + middle, at, problem.constants.upper)
            high, low = (middle, low) if found is not None and found[0] == 1e-4 else (high, middle)
        outcomes[convex] = high
    difference = 0.5 * problem.constants.upper * 1e-4
    assert outcomes[False] - outcomes[True] == pytest.approx(difference, rel=1e-6)


def test_far_trial_steps_are_rejected():
    """Fails when a trial theta without a lower problem ends the run instead of the trial."""
    draws = torch.Generator().manual_seed(0)
    X, V = (torch.randn(20, 3, generator=draws, dtype=torch.float64) for _ in range(2))
    limit = float(torch.linalg.matrix_norm(X, 2)) ** 2
    opt = MAID(
        lambda w, t: 0.5 * (X @ w - 1.0).square().sum() + 0.5 * (t.exp() * w.square()).sum(),
        lambda w: 0.5 * (V @ w - 1.0).square().sum(),
        torch.full((3,), 3.0, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        mu=lambda t: t.exp().min(),
        L=lambda t: limit + t.exp().max(),
        step=1e4,
        max_inner=500,
    )
    log = opt.run(8)
    assert "descended" in {info.status for info in log}
    assert not opt.solvable(torch.full((3,), -100.0, dtype=torch.float64))
    assert not opt.solvable(torch.full((3,), 1e4, dtype=torch.float64))


def test_official_quirk_blocks_and_ours_does_not():
    """Fails when the first loss is that of the given x: started at one better than any theta reaches, nothing moves."""
    problem = Quadratic(seed=1)
    best = torch.linalg.lstsq(problem.A1, problem.b1).solution
    official = OfficialMAID(
        problem.lower, problem.upper, problem.theta, best, mu=problem.mu, L=problem.L, Lg=problem.constants.upper
    )
    assert {info.status for info in official.run(3)} == {"tightened"}
    ours = problem.maid(x=best)
    assert {info.status for info in ours.run(3)} == {"descended"}
    with pytest.raises(ValueError, match=r"knows upper\(x\) only"):
        OfficialMAID(problem.lower, lambda x, t: x.sum(), problem.theta, best, mu=1.0, L=1.0, Lg=1.0)


def test_golden_cases_of_other_shapes():
    """Fails when the adapter reads sizes, names or numbers of cases off the one file that we have."""
    problem = Quadratic(n=9, m=2, d=5, seed=4)
    inputs = {name: getattr(problem, name).numpy() for name in ("A1", "A2", "A3", "b1", "b2")} | {
        "theta0": problem.theta.numpy()
    }
    out = conformance.compute(Case("any", inputs, {}, {"f_opt": problem.theta.numpy()}))
    assert set(out) == {"x_star_theta0", "hyper_exact", "theta_opt", "f_opt"}
    assert float(out["f_opt"]) <= problem.f(problem.theta)
    assert float(problem.gradient(torch.from_numpy(out["theta_opt"])).norm()) < 1e-6
    assert conformance.tolerance(Case("any"), "f_opt") == 1e-8
    assert conformance.tolerance(Case("any"), "loss") == 1e-3
    with pytest.raises(UnknownCase):
        conformance.compute(Case("any", {"A1": inputs["A1"]}))


def test_hoag_follows_its_schedules():
    """Fails when an accuracy follows another power, or a rejected step does not go back."""
    problem = Quadratic()
    about = (problem.lower, problem.upper, problem.theta, problem.x)
    for schedule, factor in (
        ("geometric", lambda k: 0.9**k),
        ("quadratic", lambda k: (k + 1) ** -2),
        ("cubic", lambda k: (k + 1) ** -3),
    ):
        log = HOAG(*about, mu=problem.mu, L=problem.L, schedule=schedule, eps=0.5, step=1e-3).run(4)
        assert [info.eps for info in log] == pytest.approx([0.5 * factor(k) for k in range(4)])
    own = HOAG(*about, mu=problem.mu, L=problem.L, eps=1e-6)
    first = own.step()
    # 1 / L_lambda with L_lambda = ||z|| / sqrt(d), and 0.95 of it after the first point, which is always accepted.
    assert first.step_size == pytest.approx(math.sqrt(3) / first.gradient_norm / 0.95)
    far = HOAG(*about, mu=problem.mu, L=problem.L, eps=1e-6, step=100.0)
    log = far.run(30)
    assert log[1].status == "rejected"
    assert log[1].loss == log[0].loss
    assert log[1].step_size == pytest.approx(log[0].step_size / 2)
    assert log[-1].loss < log[0].loss
    assert problem.f(far.accepted_theta) == pytest.approx(log[-1].loss, rel=1e-6)


def test_fixed_accuracy_stalls():
    """Fails when the control adapts: with a loose accuracy it ends, far from where a tight one gets."""
    problem = Quadratic()
    about = (problem.lower, problem.upper, problem.theta, problem.x)
    loose, tight = (FixedAccuracy(*about, mu=problem.mu, L=problem.L, eps=eps) for eps in (0.5, 1e-8))
    ends = [opt.run(200)[-1] for opt in (loose, tight)]
    assert ends[0].status == "stalled"
    assert {info.eps for info in ends} == {0.5, 1e-8}
    lowest = problem.f(problem.theta - torch.linalg.lstsq(*_newton(problem)).solution)
    gaps = [problem.f(opt.theta) - lowest for opt in (loose, tight)]
    assert gaps[0] > 20 * gaps[1]
    # What the adaptive method makes of the same start.
    adaptive = problem.maid(eps=0.5, delta=0.5)
    adaptive.run(200)
    assert problem.f(adaptive.theta) - lowest < 0.2 * gaps[0]


def test_own_solver_and_pytrees():
    """Fails when a solver of one's own is not used, or theta does not come back in its form."""
    problem = Quadratic()
    used = []

    def solver(gradient, x, **about):
        used.append(about)
        found = gradient_descent(gradient, x, **about)
        return LowerSolution(found.x, found.gradient_norm, found.iterations)

    def lower(x, theta):
        return problem.lower(torch.cat([x["a"], x["b"]]), torch.cat([theta[0], theta[1]]))

    opt = MAID(
        lower,
        lambda x: problem.upper(torch.cat([x["a"], x["b"]])),
        (problem.theta[:1], problem.theta[1:]),
        {"a": problem.x[:2], "b": problem.x[2:]},
        mu=problem.mu,
        L=problem.L,
        lower_solver=solver,
    )
    opt.run(3)
    flat = problem.maid(bound="heuristic", constants=None, lower_solver=gradient_descent)
    flat.run(3)
    assert used[0].keys() == {"mu", "L", "eps", "max_iterations"}
    torch.testing.assert_close(torch.cat(opt.theta), flat.theta)
    torch.testing.assert_close(opt.x["b"], flat.x[2:])


def test_state_is_complete():
    """Fails when something that the next step depends on is not saved, the bound's vectors for one."""
    problem = Quadratic()
    opt = problem.maid(bound="heuristic", constants=None, step=1.0)
    opt.run(3)
    other = problem.maid(bound="heuristic", constants=None).load_state_dict(opt.state_dict())
    assert opt.run(3) == other.run(3)
    assert torch.equal(opt.theta, other.theta)


def test_error_of_unsolved_problem_in_a_step():
    """Fails when the present theta's problem is not solved and the step goes on all the same."""
    problem = Quadratic()
    with pytest.raises(InnerToleranceNotReached, match="max_inner"):
        problem.maid(max_inner=3, eps=1e-6).step()
    with pytest.raises(RuntimeError, match=r"conjugate gradients reached.*max_cg"):
        problem.maid(max_cg=1, eps=1e-6, delta=1e-9).step()
    # Not deterministic, but said to be known.
    noisy = MAID(
        lambda x, t: problem.lower(x, t) + 0.0 * torch.rand(()),
        lambda x: problem.upper(x) + 1e-9 * torch.rand((), dtype=torch.float64),
        problem.theta,
        problem.x,
        mu=problem.mu,
        L=problem.L,
        deterministic=False,
    )
    assert noisy.step().status == "descended"


def test_hypergradient_is_what_the_step_uses():
    """Fails when the method's hypergradient and the functional one differ."""
    problem = Quadratic()
    opt = problem.maid(eps=1e-9, delta=1e-9)
    _, at = opt.inexact_gradient(opt.accurate(1e-9), 1e-9)
    functional = hypergradient(problem.lower, problem.upper, opt.x, problem.theta, cg_tol=1e-9)
    torch.testing.assert_close(functional.gradient, at.z)


def test_paper_scale_says_what_is_missing(tmp_path, monkeypatch):
    """Fails when the original set-up runs on something else, or stops without a word about its data."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # which would download it
    for arm, words in (("adaptive_loose_start", "MNIST is not here"), ("foe_adaptive", "Kodak photographs are not at")):
        with pytest.raises(Unavailable, match=words):
            run_arm(experiment, arm, 0, "paper")


def test_failures_add_trial_steps_and_moves_forget_secants():
    """Fails when a line search always has ten trials, or secants of another theta count for this one."""
    problem = Quadratic()
    opt = problem.maid(eps=1e-6, delta=1e-6, eta=0.999, step=1.0, nu=1.0)
    trials = []
    solve = opt.solve
    opt.solve = lambda theta, eps: (trials.append(not torch.equal(theta, problem.theta)), solve(theta, eps))[1]
    log = opt.run(2)
    assert [info.step_size for info in log] == [0.0, 0.5**13]  # ten trials would end at 0.5^9
    # Three rounds in the first step, each after one failure more; the fifth reaches the step that is small enough.
    assert sum(trials) == 10 + 11 + 12 + 13 + 14
    bent = problem.maid(eps=1e-3, delta=1e-3, bound="heuristic", constants=None, L=2 * problem.L)
    lower = problem.lower
    bent.problem._lower = lambda x, theta: lower(x, theta) + 1e-3 * (x**4).sum() + 1e-2 * (x.square() @ x * theta.sum())
    assert bent.step().status == "descended"
    assert set(bent.state_dict()["bound"]["largest"].values()) == {0.0}
    bent._descent_direction()
    assert min(bent.state_dict()["bound"]["largest"][name] for name in ("cross_lipschitz", "hessian_lipschitz")) > 0.0


def test_accuracy_is_a_distance():
    """Fails when the gradient's norm is taken for the distance, without mu."""
    one = torch.ones(1, dtype=torch.float64)
    opt = MAID(lambda x, t: 0.005 * (x - t).square().sum(), lambda x: x.sum(), 0 * one, one, mu=0.01, L=0.1)
    opt.accurate(0.5)
    assert abs(float(opt.x)) <= 0.5
    assert opt.problem.inner_gradients > 2
