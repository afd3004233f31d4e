"""How sure an asymptote is."""

from itertools import pairwise

import numpy as np
import pytest
from tests.bad_input import assert_refused

from regularized.overfitting.infinite_compute.law import PowerLaw
from regularized.papers.infinite_compute.intervals import fit_with_interval

LAW = PowerLaw(0.6, 1.0, 2.4)
SIZES = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]


def noisy(seed, deviation=3e-3):
    noise = np.random.default_rng(seed).standard_normal(len(SIZES))
    return [LAW(size) + deviation * z for size, z in zip(SIZES, noise, strict=True)]


def falling(seed):
    y = noisy(seed)
    return all(b < a for a, b in pairwise(y))


def test_coverage():
    """Fails when the interval is of the wrong level: t for its square, or degrees of freedom that are one off."""
    seeds = [seed for seed in range(150) if falling(seed)][:80]
    hits = 0
    for seed in seeds:
        low, high = fit_with_interval(SIZES, noisy(seed), level=0.8).interval
        hits += low <= LAW.C <= high
    assert 0.68 <= hits / len(seeds) <= 0.91


def test_order_and_level():
    """Fails when a higher level gives a narrower interval, or the asymptote lies outside."""
    y = noisy(next(seed for seed in range(100) if falling(seed)))
    narrow, wide = (fit_with_interval(SIZES, y, level=level) for level in (0.5, 0.99))
    assert wide.interval[0] < narrow.interval[0] < narrow.law.C < narrow.interval[1] < wide.interval[1]
    assert narrow.leave_one_out[0] <= narrow.law.C <= narrow.leave_one_out[1]
    assert "99% interval" in str(wide)


def test_a_straight_fall_bounds_nothing():
    """Fails when a curve that shows no bend yet is given a sure asymptote."""
    found = fit_with_interval([1.0, 2.0, 3.0, 4.0], [4.0, 3.01, 2.0, 1.01])
    assert found.interval[0] == 0.0


def test_three_points():
    """Fails when three points, which any law meets, get an interval."""
    assert_refused(lambda: fit_with_interval([1, 2, 4], [3, 2, 1]), ValueError, ("four points", "PowerLaw.fit"))
    with pytest.raises(ValueError, match="level"):
        fit_with_interval([1, 2, 3, 4], [4, 3, 2.5, 2.2], level=95)
