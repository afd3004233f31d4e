"""Worst cases against hand calculations, a linear program, dense grids, and their derivatives against differences."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize, minimize_scalar

from regularized.papers.catalogue import find
from regularized.robustness.robust_policy import (
    Chi2Penalty,
    KLBall,
    KLPenalty,
    NoUncertainty,
    TVBall,
    TVPenalty,
    ridge_regression,
    robust_expectation,
)

CAP = 3.0


def probabilities(seed, factors=4, states=7):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(factors, states, generator=generator, dtype=torch.float64).softmax(dim=1),
        CAP * torch.rand(states, generator=generator, dtype=torch.float64),
    )


def regressed(seed, factors=4, transitions=30, ridge=0.1):
    """Weights of ridge regression, of which some are negative and which do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(transitions, factors, generator=generator, dtype=torch.float64)
    weights = ridge_regression(features / features.sum(dim=1, keepdim=True), ridge=ridge).weights
    assert bool((weights < 0).any())
    return weights, CAP * torch.rand(transitions, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
def test_two_points_by_hand(p):
    """Fails when mass is moved to the wrong side, the price is charged twice, or a logarithm has the wrong base."""
    coin = torch.tensor([[1 - p, p]], dtype=torch.float64)
    worth = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = {
        TVBall(0.3): max(p - 0.3, 0.0),
        KLPenalty(0.5): -0.5 * math.log(1 - p + p * math.exp(-2.0)),
        TVPenalty(0.4): 0.4 * p,
        TVPenalty(1.7): p,
    }
    for uncertainty, value in expected.items():
        assert robust_expectation(coin, worth, uncertainty).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("radius", [0.05, 0.3, 0.9])
def test_tv_ball_is_the_linear_program(radius):
    """Fails when the dual is not that of moving a share of the mass to the worst state, as a solver does."""
    mu, values = probabilities(0)
    ours = robust_expectation(mu, values, TVBall(radius), lowest=None)
    states = len(values)
    for row, found in zip(mu.numpy(), ours, strict=True):
        # Variables: the new distribution p, and t >= |p - row|.
        eye = np.eye(states)
        solved = linprog(
            np.r_[values.numpy(), np.zeros(states)],
            A_ub=np.r_[np.c_[eye, -eye], np.c_[-eye, -eye], [np.r_[np.zeros(states), np.full(states, 0.5)]]],
            b_ub=np.r_[row, -row, radius],
            A_eq=[np.r_[np.ones(states), np.zeros(states)]],
            b_eq=[1.0],
            bounds=[(0, None)] * (2 * states),
        )
        assert found.item() == pytest.approx(solved.fun, abs=1e-9)


@pytest.mark.parametrize("radius", [0.01, 0.2, 1.0])
def test_kl_ball_is_an_exact_search(radius):
    """Fails when the search ends beside the maximum."""
    mu, values = probabilities(1)
    for row, found in zip(mu, robust_expectation(mu, values, KLBall(radius)), strict=True):

        def loss(alpha, row=row):
            return alpha * float((row.log() - values / alpha).logsumexp(0)) + alpha * radius

        solved = minimize_scalar(loss, bounds=(2e-2, 30.0), method="bounded", options={"xatol": 1e-12})
        assert found.item() == pytest.approx(-solved.fun, abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_exact_where_the_dual_is_not_concave(seed):
    """Fails when a kink, or a vertex between two, is left out: a dense grid finds nearly as much, and no more."""
    weights, values = regressed(seed)
    alpha = torch.cat([torch.linspace(0, CAP, 20001, dtype=torch.float64), values])
    clipped = torch.minimum(values[:, None], alpha)
    mean, square = weights @ clipped, weights @ clipped.square()
    ball = (mean - 0.2 * alpha).amax(dim=1)
    chi2 = (mean - (square - mean.square()) / (4 * 0.7)).amax(dim=1)
    for found, grid in (
        (robust_expectation(weights, values, TVBall(0.2), cap=CAP), ball),
        (robust_expectation(weights, values, Chi2Penalty(0.7), cap=CAP), chi2),
    ):
        assert bool((found >= grid - 1e-12).all())
        torch.testing.assert_close(found, grid, rtol=0, atol=1e-6)


def test_a_local_search_misses_what_is_found_here():
    """Fails when the exact maximum becomes a search: on the golden case Nelder-Mead from H / 2 stops below it."""
    golden = np.load(find("robust_policy").folder / "golden.npz")
    phi, values, rho = (torch.tensor(golden[f"case0/in/{name}"]) for name in ("phi", "v_next", "rho"))
    weights = ridge_regression(phi, ridge=float(golden["case0/hp/ridge"])).weights
    searched = [
        -minimize(
            lambda a, row=row, r=r: float(r * a[0] - row @ values.clamp(max=a[0])),
            CAP / 2,
            method="Nelder-Mead",
            bounds=[(0, CAP)],
        ).fun
        for row, r in zip(weights, rho.tolist(), strict=True)
    ]
    gain = robust_expectation(weights, values, TVBall(tuple(rho.tolist())), cap=CAP) - torch.tensor(searched)
    assert bool((gain > -1e-6).all())
    assert gain.max().item() == pytest.approx(1.3978 - 1.3798, abs=1e-3)


def test_without_an_adversary_it_is_the_expectation():
    """Fails when a radius of 0 or an infinite price still costs something, with ridge weights as well."""
    for weights, values in (probabilities(2), regressed(2)):
        expectation = weights @ values
        free = [TVPenalty(math.inf), KLPenalty(math.inf), Chi2Penalty(math.inf), KLBall(0.0), NoUncertainty()]
        if bool((weights >= 0).all()):
            free.append(TVBall(0.0))
        for uncertainty in free:
            found = robust_expectation(weights, values, uncertainty, cap=CAP)
            if isinstance(
                uncertainty, Chi2Penalty
            ):  # a maximum over alpha, above the expectation with negative weights
                assert bool((found >= expectation - 1e-12).all())
            else:
                torch.testing.assert_close(found, expectation, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            robust_expectation(weights, values, KLPenalty(1e6), cap=CAP), expectation, rtol=1e-5, atol=1e-5
        )


def test_ridge_mass_that_is_left_out_spoils_the_limit():
    """Fails when the sibling's form becomes the default: there a dear adversary raises the value to the cap."""
    weights, values = regressed(3)
    assert bool((robust_expectation(weights, values, KLPenalty(1e6, centred=False), cap=CAP) == CAP).any())


@pytest.mark.parametrize("kind", [TVBall, KLBall])
def test_falls_with_the_radius(kind):
    """Fails when a larger ball helps, or the worst case is above the expectation, or grows where values fall."""
    mu, values = probabilities(4)
    found = torch.stack([robust_expectation(mu, values, kind(r), cap=CAP) for r in (0.0, 0.1, 0.3, 0.6, 1.0)])
    assert bool((found.diff(dim=0) <= 1e-9).all())
    assert bool((found <= mu @ values + 1e-9).all())
    less = robust_expectation(mu, values - 0.1 * torch.rand(7, dtype=torch.float64), kind(0.3), cap=CAP)
    assert bool((less <= found[2] + 1e-9).all())


@pytest.mark.parametrize("kind", [TVPenalty, KLPenalty, Chi2Penalty])
def test_rises_with_the_price(kind):
    """Fails when a dearer adversary takes more."""
    mu, values = probabilities(5)
    found = torch.stack([robust_expectation(mu, values, kind(s), cap=CAP) for s in (0.1, 0.5, 2.0, 50.0)])
    assert bool((found.diff(dim=0) >= -1e-12).all())
    assert bool((found <= mu @ values + 1e-12).all())


def test_a_cheap_adversary_leaves_the_least_value():
    """Fails when powers of a small price underflow."""
    mu, values = probabilities(6)
    for uncertainty in (KLPenalty(1e-4), TVPenalty(1e-4), TVBall(1.0)):
        found = robust_expectation(mu, values + 2.0, uncertainty, lowest=None)
        torch.testing.assert_close(found, (values.min() + 2.0).expand(4), rtol=0, atol=2e-3)


def test_the_fail_state_is_below_what_was_seen():
    """Fails when total variation never reaches the state that is worth nothing."""
    mu, values = probabilities(7)
    with_fail, without = (robust_expectation(mu, values + 1.0, TVBall(0.2), lowest=lowest) for lowest in (0.0, None))
    torch.testing.assert_close(without - with_fail, (0.2 * (values.min() + 1.0)).expand(4))


@pytest.mark.parametrize(
    "uncertainty",
    [TVBall((0.1, 0.0, 0.4, 0.2)), KLBall(0.2), TVPenalty(0.5), KLPenalty(0.5), Chi2Penalty(0.5), NoUncertainty()],
    ids=lambda one: type(one).__name__,
)
def test_derivatives(uncertainty):
    """Fails when the worst case is not differentiated at the dual variable that it is taken at."""
    weights, values = probabilities(8) if isinstance(uncertainty, KLBall) else regressed(8)
    if isinstance(uncertainty, KLBall):  # negative weights can put the maximum where the mass is bounded, at a kink
        weights = 0.9 * weights
    both = (weights.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, v: robust_expectation(w, v, uncertainty, cap=CAP), both, atol=1e-5)
    # Rows that sum to 1 would lack mass once one entry is changed: by values alone.
    weights, values = probabilities(8)
    one = (values.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda v: robust_expectation(weights, v, uncertainty, cap=CAP), one, atol=1e-5)


def test_no_data_is_no_value():
    """Fails when an agent cannot begin."""
    for uncertainty in (TVBall(0.1), KLBall(0.1), Chi2Penalty(0.5)):
        assert robust_expectation(torch.zeros(3, 0), torch.zeros(0), uncertainty, cap=CAP).tolist() == [0.0] * 3
