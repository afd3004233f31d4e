"""Laws and their fit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from regularized.overfitting.infinite_compute.law import PowerLaw, data_efficiency, least_squares

PAPER = PowerLaw(0.05, 1.02, 3.43)
SIZES = [0.15, 0.3, 0.6, 1.4]


@pytest.mark.parametrize("law", [PAPER, PowerLaw(2.0, 0.1, 0.5), PowerLaw(0.3, 3.0, 1.0), PowerLaw(1.0, 1.0, 0.0)])
def test_exact_points_give_the_law_back(law):
    """Fails when the search stops early, the closed form of A and C is wrong, or the unit of x is not undone."""
    losses = [law(size) for size in SIZES]
    assert PowerLaw.fit(SIZES, losses) == pytest.approx(law, rel=1e-6, abs=1e-6)
    a, b, c = PowerLaw.fit([size * 1e9 for size in SIZES], losses)
    assert (a * 1e9**-b, b, c) == pytest.approx(law, rel=1e-6, abs=1e-6)


def test_inverse():
    """Fails when the exponent of the inverse has the wrong sign, or C is not taken off."""
    for size in SIZES:
        assert PAPER.solve(PAPER(size)) == pytest.approx(size, rel=1e-12)


def test_units_of_size():
    """Fails when another unit of x changes more than A, which becomes A s^B."""
    noisy = [PAPER(size) + noise for size, noise in zip(SIZES, (1e-3, -1e-3, 5e-4, 0.0), strict=True)]
    a, b = PowerLaw.fit(SIZES, noisy), PowerLaw.fit([1000 * size for size in SIZES], noisy)
    assert pytest.approx(a.B, rel=1e-6) == b.B
    assert pytest.approx(a.C, rel=1e-9) == b.C
    assert pytest.approx(a.A * 1000**a.B, rel=1e-6) == b.A


def test_order_of_points_is_free():
    """Fails when the fit or its refusal takes the points as they come."""
    assert PowerLaw.fit([4, 1, 2], [2.25, 3.0, 2.5]) == pytest.approx(PowerLaw.fit([1, 2, 4], [3.0, 2.5, 2.25]))


@settings(max_examples=25, deadline=None)
@given(
    law=st.builds(PowerLaw, st.floats(0.02, 2), st.floats(0.2, 2), st.floats(0.5, 4)),
    seed=st.integers(0, 1000),
)
def test_no_worse_than_scipy(law, seed):
    """Fails when the least squares are not the least: SciPy from the paper's start and bounds finds a lower sum."""
    x = np.array([1.0, 2, 3, 4, 5, 8])
    y = law.A / x**law.B + law.C + 1e-3 * np.random.default_rng(seed).standard_normal(6)

    def rest(a, b, c):
        return float(((a / x**b + c - y) ** 2).sum())

    ours = rest(*least_squares(torch.tensor(x), torch.tensor(y)))
    theirs, _ = curve_fit(lambda x, a, b, c: a / x**b + c, x, y, p0=(1, 0.5, 2), bounds=(0, np.inf), max_nfev=20_000)
    assert ours <= rest(*theirs) * (1 + 1e-6) + 1e-15


def test_bounds_hold():
    """Fails when a straight line falling to below zero gives a negative asymptote."""
    law = least_squares([1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.01])
    assert law.C == 0.0
    assert law.A > 0


def test_rising_curves_have_no_slope():
    """Fails when A may become negative: the best law of a rising curve is a constant, its mean."""
    law = least_squares([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert law.A == 0.0
    assert pytest.approx(2.0) == law.C


def test_papers_efficiency():
    """Fails when the factor is upside down: the baseline needs more data for a lower loss."""
    baseline = PowerLaw(1.0, 0.5, 2.0)
    assert data_efficiency(baseline, 2.25, data=4.0) == pytest.approx(16 / 4)
    assert data_efficiency(baseline, 2.1, data=4.0) > data_efficiency(baseline, 2.25, data=4.0)
