"""Theory of linear students: limits, simulation, quadrature, and the exact course of one data set.

Golden vectors and bad inputs are in the contract suite. Each test names the fault that makes it fail.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.integrate import quad

from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics, Spectrum, steps_for
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow
from regularized.understanding.generalization_dynamics.plot import plot_dynamics

ALPHAS = (0.2, 0.5, 0.9, 0.999999, 1.0, 1.000001, 1.1, 2.0, 5.0)
T = torch.logspace(-2, 3, 30, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_moments_of_the_spectrum(alpha):
    """Fails for a wrong density, a missing atom at zero, or a pole left to the quadrature next to alpha = 1."""
    spectrum = Spectrum.marchenko_pastur(alpha)
    first = float((spectrum.masses * spectrum.eigenvalues).sum())
    second = float((spectrum.masses * spectrum.eigenvalues.square()).sum())
    assert first == pytest.approx(alpha, rel=1e-12)
    assert second == pytest.approx(alpha + alpha**2, rel=1e-12)
    assert spectrum.zero + float(spectrum.masses.sum()) == pytest.approx(1.0, abs=1e-15)
    if abs(alpha - 1.0) > 0.01:
        assert spectrum.zero == pytest.approx(max(0.0, 1.0 - alpha), abs=1e-12)
        inverse = float((spectrum.masses / spectrum.eigenvalues).sum())
        assert inverse == pytest.approx(spectrum.inverse(), rel=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_start(alpha):
    """At t = 0 both errors are noise + signal + start: fails when the average length of an input is not 1."""
    dynamics = LinearDynamics(alpha, signal=1.5, noise=0.3, start=0.7)
    assert float(dynamics.test_error(0.0)) == pytest.approx(2.5, rel=1e-12)
    assert float(dynamics.train_error(0.0)) == pytest.approx(2.5, rel=1e-12)


@pytest.mark.parametrize("alpha", [a for a in ALPHAS if abs(a - 1) > 0.01])
def test_late_limits(alpha):
    """Closed limits of the paper; fails when the frozen part forgets the start, or noise is divided by l twice."""
    dynamics = LinearDynamics(alpha, signal=1.5, noise=0.3, start=0.7)
    late = 0.3 * alpha / (alpha - 1) if alpha > 1 else 0.3 + (1 - alpha) * 2.2 + 0.3 * alpha / (1 - alpha)
    assert dynamics.late_test_error() == pytest.approx(late, rel=1e-12)
    assert float(dynamics.test_error(math.inf)) == pytest.approx(late, rel=1e-12)
    assert float(dynamics.test_error(1e6)) == pytest.approx(late, rel=1e-9)
    assert float(dynamics.train_error(math.inf)) == pytest.approx(0.3 * max(0.0, 1 - 1 / alpha), abs=1e-12)


def test_worst_at_equality():
    """The late error diverges at alpha = 1 with noise, and only with noise."""
    assert LinearDynamics(1.0, noise=0.25).late_test_error() == math.inf
    assert float(LinearDynamics(1.0, noise=0.25).test_error(1e5)) == pytest.approx(52.38, rel=1e-3)
    assert LinearDynamics(1.0).late_test_error() == 0.0


@pytest.mark.parametrize("gamma", [0.0, 0.4])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_against_adaptive_quadrature(alpha, gamma):
    """A second derivation: the integrals of the paper as they stand, by scipy's adaptive quadrature over l."""
    signal, noise, start = 1.3, 0.4, 0.2
    low, high = (1 - math.sqrt(alpha)) ** 2, (1 + math.sqrt(alpha)) ** 2

    def density(l):  # noqa: E741
        return math.sqrt(max(0.0, (high - l) * (l - low))) / (2 * math.pi * l)

    def integral(f):
        # l = low + s² takes the root's singularity away.
        return quad(lambda s: density(low + s * s) * f(low + s * s) * 2 * s, 0, math.sqrt(high - low), limit=400)[0]

    dynamics = LinearDynamics(alpha, signal=signal, noise=noise, start=start, weight_decay=gamma)
    for t in (0.3, 3.0, 30.0):

        def test_mode(l, t=t):  # noqa: E741
            d = math.exp(-(l + gamma) * t)
            share = l / (l + gamma) * (1 - d)
            return start * d**2 + signal * (share - 1) ** 2 + noise * l / (l + gamma) ** 2 * (1 - d) ** 2

        def train_mode(l, t=t):  # noqa: E741
            d = math.exp(-(l + gamma) * t)
            share = l / (l + gamma) * (1 - d)
            return l * (start * d**2 + signal * (share - 1) ** 2) + noise * (1 - share) ** 2

        frozen = max(0.0, 1 - alpha) * (start * math.exp(-2 * gamma * t) + signal)
        assert float(dynamics.test_error(t)) == pytest.approx(noise + integral(test_mode) + frozen, rel=1e-7)
        expected = integral(train_mode) / alpha + max(0.0, 1 - 1 / alpha) * noise
        assert float(dynamics.train_error(t)) == pytest.approx(expected, rel=1e-7)


@given(st.floats(0.05, 20.0), st.floats(0.0, 2.0), st.floats(0.0, 2.0))
@settings(max_examples=25)
def test_without_weight_decay_the_training_error_falls(alpha, noise, start):
    """Gradient descent on the training error cannot raise it: fails for a wrong sign or factor in any of its terms."""
    errors = LinearDynamics(alpha, noise=noise, start=start).train_error(T)
    assert bool((errors.diff() <= 1e-12).all())


@given(st.floats(0.05, 20.0), st.floats(0.0, 2.0))
@settings(max_examples=25)
def test_without_noise_nothing_overtrains(alpha, start):
    """Without noise the test error falls for every alpha."""
    errors = LinearDynamics(alpha, start=start).test_error(T)
    assert bool((errors.diff() <= 1e-12).all())


def test_almost_no_data_teaches_nothing():
    errors = LinearDynamics(1e-6, signal=1.5, noise=0.3, start=0.7).test_error(T)
    torch.testing.assert_close(errors, torch.full_like(errors, 2.5), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_best_weight_decay(alpha):
    """noise / signal is the minimum over weight decays: fails when gamma is not in units of the summed loss."""
    best = LinearDynamics(alpha, signal=2.0, noise=0.5).optimal_weight_decay()
    assert best.at == 0.25
    for factor in (0.8, 1.25):
        other = LinearDynamics(alpha, signal=2.0, noise=0.5, weight_decay=factor * best.at)
        assert other.late_test_error() > best.error


@pytest.mark.parametrize(
    ("alpha", "best", "late", "ridge"),
    [(0.2, 1.0967, 1.113, 1.0956), (0.5, 0.8951, 1.0, 0.8904), (0.9, 0.6897, 2.6, 0.6806), (2.0, 0.4322, 0.5, 0.4254)],
)
def test_published_table(alpha, best, late, ridge):
    """Signal to noise 4, as computed independently."""
    dynamics = LinearDynamics(alpha, noise=0.25)
    assert dynamics.optimal_stopping().error == pytest.approx(best, abs=1e-4)
    assert dynamics.late_test_error() == pytest.approx(late, abs=1e-3)
    assert dynamics.optimal_weight_decay().error == pytest.approx(ridge, abs=1e-4)


def test_best_time_of_many_samples():
    """For alpha -> infinity the best time is ln(1 + alpha SNR) / alpha."""
    stop = LinearDynamics(1000.0, noise=0.25).optimal_stopping(earliest=1e-4)
    assert stop.at == pytest.approx(math.log(1 + 4000.0) / 1000.0, rel=0.02)


def test_nothing_to_stop_for():
    """With the best weight decay the error falls for ever: the time is infinite, not the end of the scan."""
    stop = LinearDynamics(0.8, signal=2.0, noise=0.5, weight_decay=0.25).optimal_stopping()
    assert stop.at == math.inf


@pytest.mark.parametrize(("alpha", "bound"), [(0.5, 0.1), (1.0, 0.25), (2.0, 0.1)])
def test_simulation_agrees(alpha, bound):
    """Twelve draws of 200 inputs, solved exactly, lie around the theory: fails for any wrong convention of scale."""
    dynamics = LinearDynamics(alpha, noise=0.25, start=0.5)
    t = torch.logspace(-1, 1.5, 8, dtype=torch.float64)
    tests, trains = [], []
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(round(alpha * 200), 200, generator=g, dtype=torch.float64) / math.sqrt(200)
        teacher, start = (torch.randn(200, generator=g, dtype=torch.float64) for _ in range(2))
        y = x @ teacher + 0.5 * torch.randn(len(x), generator=g, dtype=torch.float64)
        flow = GradientFlow(x, y, initial=math.sqrt(0.5) * start)
        tests.append(flow.population_error(teacher, t, noise=0.25))
        trains.append(flow.train_error(t))
    for mean, theory in (
        (torch.stack(tests).mean(dim=0), dynamics.test_error(t)),
        (torch.stack(trains).mean(dim=0), dynamics.train_error(t)),
    ):
        assert float(((mean - theory).abs() / theory).max()) < bound


@pytest.mark.parametrize("shape", [(8, 12), (15, 6), (6, 6), (1, 3)])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_flow_is_the_limit_of_gradient_descent(shape, gamma):
    """Plain steps with a small rate end where the flow is, the error falling with the rate: fails for a wrong sign."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*size, generator=g, dtype=torch.float64) for size in (shape, (shape[0], 2)))
    start = torch.randn(shape[1], 2, generator=g, dtype=torch.float64)
    flow = GradientFlow(x, y, initial=start, weight_decay=gamma)
    distances = []
    for lr in (2e-3, 1e-3):
        w = start.clone()
        for _ in range(round(1.0 / lr)):
            w = w - lr * (x.T @ (x @ w - y) + gamma * w)
        distances.append(float((w - flow.weights(1.0)).abs().max()))
    assert distances[1] < 5e-3
    assert distances[0] / distances[1] == pytest.approx(2.0, rel=0.1)


def test_flow_ends_at_ridge_regression():
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    ridge = torch.linalg.solve(x.T @ x + 0.7 * torch.eye(6).double(), x.T @ y)
    torch.testing.assert_close(GradientFlow(x, y, weight_decay=0.7).weights(math.inf), ridge)


def test_predictions_equal_weights_times_features():
    """Fails when outputs by way of the modes lose the part of the start that no sample reaches."""
    x, other = torch.randn(5, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    start = torch.randn(9, 3, dtype=torch.float64)
    flow = GradientFlow(x, torch.randn(5, 3), initial=start, weight_decay=0.1)
    t = torch.tensor([0.0, 0.7, math.inf])
    torch.testing.assert_close(flow.predict(other, t), other @ flow.weights(t))
    one = GradientFlow(x, torch.randn(5), initial=start[:, 0])
    torch.testing.assert_close(one.predict(other, 0.7), other @ one.weights(0.7))


def test_training_curve_from_features_is_that_of_isotropic_teachers():
    """With the data's own spectrum the training error is the mean over teachers and noises, for any features."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(30, 12, generator=g, dtype=torch.float64).square()
    x = x - x.mean(dim=0)
    scale = math.sqrt(float(x.square().sum(dim=1).mean()))
    t = torch.tensor([0.0, 1.0, 10.0, 1e3], dtype=torch.float64)
    teachers = torch.randn(12, 4000, generator=g, dtype=torch.float64)
    y = (x / scale) @ teachers + 0.5 * torch.randn(30, 4000, generator=g, dtype=torch.float64)
    solved = GradientFlow(x / scale, y).train_error(t)
    theory = LinearDynamics(30 / 12, noise=0.25, spectrum=Spectrum.of(x / scale)).train_error(t)
    torch.testing.assert_close(solved, theory, rtol=0.03, atol=0.0)


def test_noise_is_estimated_and_scale_reported():
    """Fails when the residual is not corrected for the fitted parameters, or time is not scaled back."""
    g = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(400, 100, generator=g, dtype=torch.float64)
    y = x @ torch.randn(100, generator=g, dtype=torch.float64) / 30.0 + torch.randn(400, generator=g).double()
    dynamics = LinearDynamics.from_features(x, y)
    assert dynamics.noise == pytest.approx(1.0, rel=0.15)
    assert dynamics.signal == pytest.approx(1.0, rel=0.3)
    assert dynamics.feature_scale == pytest.approx(900.0, rel=0.05)
    assert dynamics.steps_for(2.0, lr=1e-3, samples=400) == pytest.approx(
        steps_for(2.0, lr=1e-3, samples=400) / dynamics.feature_scale
    )


@pytest.mark.parametrize("loss", ["sum", "mean", "mse"])
def test_steps_are_those_of_torch(loss):
    """Gradient descent by torch on each form of the loss is where the flow is at the time of so many steps."""
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    lr = {"sum": 1e-4, "mean": 3e-3, "mse": 1.5e-3}[loss]
    steps = round(steps_for(0.05, lr=lr, samples=30, loss=loss))
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        squared = (x @ w - y).square()
        value = {"sum": 0.5 * squared.sum(), "mean": 0.5 * squared.mean(), "mse": squared.mean()}[loss]
        (gradient,) = torch.autograd.grad(value, w)
        w = (w - lr * gradient).detach().requires_grad_()
    torch.testing.assert_close(w.detach(), GradientFlow(x, y).weights(0.05), rtol=0.01, atol=1e-3)


def test_momentum_runs_faster():
    assert steps_for(1.0, lr=0.1, samples=10, momentum=0.9) == pytest.approx(steps_for(1.0, lr=0.1, samples=10) / 10)


def test_empirical_spectrum_counts_the_frozen_directions():
    x = torch.randn(5, 8, dtype=torch.float64)
    spectrum = Spectrum.of(x)
    assert len(spectrum.eigenvalues) == 5
    assert spectrum.zero == pytest.approx(3 / 8)
    np.testing.assert_allclose(spectrum.eigenvalues, torch.linalg.svdvals(x).square(), rtol=1e-12)


def test_plot(tmp_path):
    """What is drawn is the theory: fails when training and test error change places."""
    x, y = torch.randn(40, 10), torch.randn(40)
    dynamics = LinearDynamics.from_features(x - x.mean(dim=0), y)
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_dynamics(dynamics, left, right, flow=GradientFlow(x, y), held_out=(x, y))
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in left.lines}
    assert drawn["test error, theory"][-1] > drawn["training error, theory"][-1]
    np.testing.assert_allclose(drawn["training error, this data"], drawn["held-out error, this data"])
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="needs flow"):
        plot_dynamics(dynamics, left, held_out=(x, y))
