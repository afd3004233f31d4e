"""Unfolded ISTA and IHT: equal to the plain algorithms, true to their fixed points, trained by what each loss can see.

Golden vectors, bad inputs, resume and two processes are in the contract suite. Each test names the fault that makes it
fail.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regularized.scientific.deep_unfolding.layer import (
    Unfolded,
    UnfoldedIHT,
    UnfoldedISTA,
    hard_threshold,
    soft_threshold,
)
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining

M, N = 8, 14
NORMS = {UnfoldedISTA: "l1", UnfoldedIHT: "l0"}
BOTH = pytest.mark.parametrize("kind", [UnfoldedISTA, UnfoldedIHT])


def matrix(seed=0, rows=M, columns=N):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / rows**0.5


def measurements(seed=1, size=5):
    return BernoulliGaussian(matrix(), density=0.3, seed=seed)(size)


@BOTH
def test_untrained_is_the_plain_algorithm(kind):
    """A second derivation in numpy, as the paper writes it: fails for a missing 1/2, a sign, or a wrong threshold."""
    a, (_, y) = matrix().numpy(), measurements()
    net = kind(matrix(), 0.1, layers=7)
    gamma = 1 / np.linalg.norm(a, 2) ** 2
    x = np.zeros((len(y), N))
    for k in range(7):
        r = x - gamma * (x @ a.T - y.numpy()) @ a
        if kind is UnfoldedISTA:
            x = np.sign(r) * np.maximum(np.abs(r) - 0.1 * gamma, 0)
        else:
            x = r * (np.abs(r) > np.sqrt(2 * 0.1 * gamma))
        np.testing.assert_allclose(net(y, depth=k + 1).detach(), x, atol=1e-14)
    torch.testing.assert_close(net.iterate(y, 7), net(y).detach(), rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_objective_does_not_rise(kind, share):
    """With a step below 1/L every iteration lowers the objective that belongs to it: fails for another threshold."""
    net = kind(matrix(), 0.1, layers=30)
    with torch.no_grad():
        net.steps.mul_(share)
        values = SparseObjective(matrix(), 0.1, norm=NORMS[kind])(
            net(measurements()[1], all_layers=True), measurements()[1]
        )
    assert bool((values.diff(dim=0) <= 1e-12).all())


@BOTH
def test_identity_is_a_fixed_point(kind):
    """For A = I and step 1 one layer gives soft(y, lambda), or hard(y, sqrt(2 lambda)), and stays there."""
    y = torch.linspace(-2, 2, 10, dtype=torch.float64)[None]
    net = kind(torch.eye(10, dtype=torch.float64), 0.3, layers=3)
    expected = soft_threshold(y, 0.3) if kind is UnfoldedISTA else hard_threshold(y, 0.6**0.5)
    for depth in (1, 3):
        torch.testing.assert_close(net(y, depth=depth).detach(), expected, rtol=0, atol=1e-15)


def test_tiny_penalty_is_landweber():
    """Without a penalty both are gradient descent, and equal."""
    y, a = measurements()[1], matrix()
    ista, iht = (kind(a, 1e-300, layers=40)(y).detach() for kind in (UnfoldedISTA, UnfoldedIHT))
    x, gamma = torch.zeros_like(ista), 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2
    for _ in range(40):
        x = x - gamma * (x @ a.T - y) @ a
    torch.testing.assert_close(ista, x)
    torch.testing.assert_close(iht, x)


def test_large_penalty_gives_zero():
    """For lambda >= max |A^T y| the answer is 0 for any steps."""
    y = measurements()[1]
    net = UnfoldedISTA(matrix(), float((y @ matrix()).abs().max()) * 1.001, layers=5)
    with torch.no_grad():
        net.steps.uniform_(0.01, 3.0)
    assert not net(y).any()


def test_fixed_point_of_ista_is_optimal():
    """|A^T (y - A x)| <= lambda, with equality and the right sign on the support."""
    y, a = measurements()[1], matrix()
    x = UnfoldedISTA(a, 0.1, layers=1).iterate(y, 20_000)
    slope = (y - x @ a.T) @ a
    assert float(slope.abs().max()) <= 0.1 + 1e-9
    on = x != 0
    torch.testing.assert_close(slope[on], 0.1 * x[on].sign())


@BOTH
def test_permuted_signals(kind):
    """Permuting columns and signals together permutes the output."""
    order, y = torch.randperm(N), measurements()[1]
    one, other = kind(matrix(), 0.1, layers=4), kind(matrix()[:, order], 0.1, layers=4)
    torch.testing.assert_close(other(y), one(y)[:, order])


def test_gradients_of_thresholds():
    """soft: 1 and -sign(r) beyond the threshold; hard: 1, and nothing to the threshold. Fails for a smoothed jump."""
    r = torch.tensor([-2.0, -0.5, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    by_r, by_theta = torch.autograd.grad((weights * soft_threshold(r, theta)).sum(), (r, theta))
    assert by_r.tolist() == [1.0, 0.0, 0.0, 1000.0]
    assert by_theta.item() == 1.0 - 1000.0
    by_r, by_theta = torch.autograd.grad((weights * hard_threshold(r, theta)).sum(), (r, theta), allow_unused=True)
    assert by_r.tolist() == [1.0, 0.0, 0.0, 1000.0]
    assert by_theta is None


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(0.0, 20.0))
@settings(max_examples=50)
def test_proximal_maps(values, theta):
    """Both minimise what they are the proximal map of, against a fine grid: fails for any other threshold."""
    r = torch.tensor(values, dtype=torch.float64)
    grid = torch.linspace(-60, 60, 4801, dtype=torch.float64)
    distance = 0.5 * (grid[:, None] - r).square()
    for x, cost, grid_cost in (
        (soft_threshold(r, theta), theta * soft_threshold(r, theta).abs(), theta * grid.abs()),
        (
            hard_threshold(r, theta),
            theta**2 / 2 * (hard_threshold(r, theta) != 0).double(),
            theta**2 / 2 * (grid != 0).double(),
        ),
    ):
        best = (distance + grid_cost[:, None]).min(dim=0).values
        assert bool((0.5 * (x - r).square() + cost <= best + 1e-9).all())


def test_l0_gradient_sees_the_misfit_only():
    """The number of non-zeros is in the value and not in the gradient."""
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    y = measurements(size=3)[1]
    gradients = [
        torch.autograd.grad(SparseObjective(matrix(), lam, norm="l0")(x, y).sum(), x)[0] for lam in (0.01, 10.0)
    ]
    assert torch.equal(*gradients)
    values = [SparseObjective(matrix(), lam, norm="l0")(x, y) for lam in (0.01, 10.0)]
    torch.testing.assert_close(values[1] - values[0], torch.full((3,), 9.99 * N, dtype=torch.float64))


def test_unsupervised_training_never_reads_the_signals():
    """Signals of nan leave loss and steps finite: fails when targets leak into the objective."""
    sampler = BernoulliGaussian(matrix(), density=0.3)

    def blind(size):
        x, y = sampler(size)
        return x * float("nan"), y

    net = UnfoldedISTA(matrix(), 0.1, layers=3)
    losses = IncrementalTraining(net, blind, loss=SparseObjective(matrix(), 0.1), steps_per_layer=5).fit()
    assert np.isfinite(losses).all()
    assert bool(net.steps.isfinite().all())


def test_training_grows_layer_by_layer():
    """Generation t leaves the steps of later layers alone; the newest layer alone leaves the earlier ones too."""
    net = UnfoldedISTA(matrix(), 0.1, layers=4)
    start = net.steps.detach().clone()
    training = IncrementalTraining(net, BernoulliGaussian(matrix(), density=0.3), steps_per_layer=5)
    training.fit(layers=2)
    assert torch.equal(net.steps.detach()[2:], start[2:])
    assert bool((net.steps.detach()[:2] != start[:2]).all())
    frozen = IncrementalTraining(
        copy.deepcopy(net), BernoulliGaussian(matrix(), density=0.3), steps_per_layer=5, freeze_prefix=True
    )
    frozen.generation = 2
    frozen.fit(layers=3)
    assert torch.equal(frozen.network.steps.detach()[:2], net.steps.detach()[:2])
    assert frozen.network.steps.detach()[2] != start[2]


def test_training_does_what_it_is_for():
    """Trained on the objective, 6 layers get nearer to its optimum than 6 iterations; on signals, nearer to these.

    The control trains uphill and must end worse: fails for a wrong sign or a step that is not taken.
    """
    a, (x, y) = matrix(rows=20, columns=30), BernoulliGaussian(matrix(rows=20, columns=30), seed=9)(300)
    objective = SparseObjective(a, 0.3)

    def trained(loss):
        net = UnfoldedISTA(a, 0.3, layers=6)
        IncrementalTraining(net, BernoulliGaussian(a, seed=1), loss=loss, steps_per_layer=60, lr=0.05).fit()
        return net(y).detach()

    plain = UnfoldedISTA(a, 0.3, layers=1)
    after_six, optimum = plain.iterate(y, 6), plain.iterate(y, 3000)

    def value(z):
        return float(objective(z, y).mean())

    gap = value(after_six) - value(optimum)
    by_objective, supervised = trained(objective), trained("supervised")
    assert value(by_objective) - value(optimum) < 0.2 * gap
    assert value(trained(lambda z, y: -objective(z, y))) > value(after_six)

    def error(z):
        return float((z - x).square().mean())

    assert error(supervised) < 0.95 * error(by_objective)
    assert error(supervised) < 0.9 * error(after_six)


def test_steps_stay_positive():
    net = UnfoldedISTA(matrix(), 0.1, layers=2)
    training = IncrementalTraining(
        net, BernoulliGaussian(matrix()), loss=lambda x, y: x.square().sum(-1), lr=1.0, steps_per_layer=10
    )
    training.fit()
    assert float(net.steps.detach().min()) == pytest.approx(1e-4)


def test_free_thresholds_are_trained():
    net = UnfoldedISTA(matrix(), 0.1, layers=2, tie_threshold=False)
    tied = UnfoldedISTA(matrix(), 0.1, layers=2)
    y = measurements()[1]
    torch.testing.assert_close(net(y), tied(y))
    net(y).square().sum().backward()
    assert net.thresholds.grad is not None
    assert bool((net.thresholds.grad != 0).all())


def test_any_proximal_gradient_method_unfolds():
    """Non-negative least squares as layers: the generic class carries another problem to its optimum."""
    a, y = matrix(rows=12, columns=5), torch.randn(3, 12, dtype=torch.float64)
    step = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2
    net = Unfolded(
        lambda x, y: (x @ a.T - y) @ a, lambda r, _: r.clamp(min=0), signal=5, layers=3000, step=step, dtype=y.dtype
    )
    x = net(y).detach()
    slope = (x @ a.T - y) @ a
    assert float(x.min()) >= 0
    assert float((x * slope).abs().max()) < 1e-8
    assert float(slope.min()) > -1e-8
    with pytest.raises(ValueError, match="give iterate"):
        net.iterate(y, 1)


def test_signals_have_the_promised_density_and_noise():
    sampler = BernoulliGaussian(torch.zeros(50, 40), density=0.2, noise=0.09)
    x, y = sampler(2000)
    assert float((x != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(x[x != 0].var()) == pytest.approx(1.0, abs=0.05)
    assert float(y.var()) == pytest.approx(0.09, rel=0.03)


def test_what_is_not_a_number_stays_seen():
    """Fails when "nan > theta" makes a diverged signal look like one that is sparse."""
    kept = hard_threshold(torch.tensor([float("nan"), float("inf"), 0.5, -2.0]), 1.0)
    torch.testing.assert_close(kept, torch.tensor([float("nan"), float("inf"), 0.0, -2.0]), equal_nan=True)
