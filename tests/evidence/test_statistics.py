import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from regularized.evidence.statistics import (
    LEVEL,
    band,
    common_by_chance,
    failure_bound,
    holm,
    interval_of_mean,
    p_at_least,
    p_less,
)

EFFECTS = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=9)


def sign_flips(effects, threshold):
    """The permutation test as the book has it: all sign flips, one by one."""
    d = [effect - threshold for effect in effects]
    sums = [math.fsum(s * x for s, x in zip(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(total >= math.fsum(d) - 1e-9 for total in sums) / len(sums)


@given(EFFECTS, st.floats(-3, 3).map(lambda x: round(x, 3)))
def test_p_value_is_the_larger_of_both_tests(effects, threshold):
    """Fails for a two-sided test, the wrong direction, a sum over n - 1, or one test in place of the larger p."""
    p = p_at_least(effects, threshold)
    if np.std(effects) > 1e-6:
        t = stats.ttest_1samp(effects, threshold, alternative="greater").pvalue
        assert p == pytest.approx(max(t, sign_flips(effects, threshold)), abs=1e-9)
    assert p >= sign_flips(effects, threshold) - 1e-12


@given(EFFECTS, st.floats(-3, 3))
def test_less_is_the_mirror_image(effects, threshold):
    """Fails when the two directions are tested by different rules."""
    assert p_less(effects, threshold) == p_at_least([-x for x in effects], -threshold)


@given(EFFECTS, st.floats(-3, 3), st.floats(0, 5))
def test_adding_a_constant_never_raises_the_p_value(effects, threshold, more):
    """Fails when a better seed can turn a verdict downwards."""
    assert p_at_least([x + more for x in effects], threshold) <= p_at_least(effects, threshold) + 1e-9


def test_resplits_widen_by_nadeau_and_bengio():
    """Fails when splits of one pool count as independent, or the ratio is inverted."""
    effects, ratio = [1.0, 2.0, 3.0, 2.5, 1.5, 2.0, 2.2, 1.8, 2.6, 1.4], 0.5
    se = math.sqrt(np.var(effects, ddof=1) * (1 / 10 + ratio))
    assert p_at_least(effects, 1.0, resplit=ratio) == pytest.approx(stats.t.sf((np.mean(effects) - 1.0) / se, 9))
    low, high = interval_of_mean(effects, resplit=ratio)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 9, np.mean(effects), se))


@pytest.mark.parametrize("seeds", [list(range(20)), [*range(300, 310), *range(310, 313)], [3, 8, 14]])
def test_rows_in_common_by_chance_are_counted_by_pairs(seeds):
    """Fails if pairs within a block count, if a pair counts with itself, or the block's width is another."""
    pairs = list(itertools.combinations(seeds, 2))
    rho = 0.06 * sum(a // 10 != b // 10 for a, b in pairs) / len(pairs)
    assert common_by_chance(seeds, 0.06) == pytest.approx(rho / (1 - rho))


def test_one_block_has_nothing_in_common():
    """Fails if what nobody shares widens an interval."""
    assert common_by_chance(range(200, 210), 0.06) == common_by_chance([4], 0.06) == common_by_chance(range(30), 0) == 0
    with pytest.raises(ValueError, match="share must be"):
        common_by_chance(range(20), 1.0)


def test_variance_of_a_mean_over_blocks_is_estimated_without_bias():
    """Fails if r is rho itself: a variance among seeds that correlate is too small by 1 - rho as well."""
    blocks = np.repeat([0, 1], 10)
    covariance = np.where(blocks[:, None] == blocks, 0.0, 0.2) + np.eye(20)
    variance_of_mean = covariance.mean()
    expected_square = np.trace(covariance - covariance.mean(axis=0)) / 19  # of s: trace of the centred covariance
    assert expected_square * (1 / 20 + common_by_chance(range(20), 0.2)) == pytest.approx(variance_of_mean)


@given(st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), min_size=6, max_size=9).filter(lambda x: np.std(x) > 0))
def test_interval_is_what_the_tests_do_not_reject(effects):
    """Fails when the bar that is drawn says other than the verdict: its ends are where p passes 2.5 %."""
    low, high = interval_of_mean(effects)
    width = high - low
    for inside, outside, p in ((low + 1e-6 * width, low - 1e-6 * width, p_at_least), (high, high, p_less)):
        sign = 1 if p is p_at_least else -1
        inside, outside = (low, low) if sign == 1 else (high, high)
        assert p(effects, inside + sign * 1e-6 * width) > LEVEL
        assert p(effects, outside - sign * 1e-6 * width) <= LEVEL


def test_equal_seeds_need_no_spread():
    """Fails by a division by zero, or when exactly the threshold counts as more than it."""
    assert p_at_least([3.0] * 10, 1.0) == pytest.approx(2**-10)
    assert p_at_least([3.0] * 10, 4.0) == 1.0
    assert p_at_least([1.0] * 10, 1.0) == 1.0
    assert p_at_least([1.0] * 10, 1.0, resplit=0.5) == 0.5
    assert interval_of_mean([3.0] * 10) == (3.0, 3.0)


def test_sums_of_accuracies_that_cancel_count_as_zero():
    """Fails when 0.1 + 0.2 - 0.3 > 0 decides: accuracies are multiples of one sample, and ties are common."""
    effects = [0.1, 0.2, -0.3, 0.1, 0.2, -0.3]
    assert p_at_least(effects, 0.0) == pytest.approx(sign_flips(effects, 0.0))


def test_many_seeds_are_drawn_alike_for_all():
    """Fails when thirty seeds take 2^30 flips, or the drawing makes a p-value of the day."""
    effects = list(np.random.default_rng(0).normal(0.5, 1.0, 30))
    assert p_at_least(effects, 0.0) == p_at_least(effects, 0.0)
    assert p_at_least(effects, 0.0) == pytest.approx(
        stats.ttest_1samp(effects, 0, alternative="greater").pvalue, abs=5e-3
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_agrees_with_its_step_down_form(p_values):
    """Fails for Bonferroni, a factor that starts at n - 1, or results that are not monotone."""
    corrected = holm(p_values)
    for level in (0.01, 0.025, 0.2, 0.9):
        rejected, ordered = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        for done, i in enumerate(ordered):
            if p_values[i] > level / (len(p_values) - done):
                break
            rejected.add(i)
        near = any(abs(p * (len(p_values) - k) - level) < 1e-9 for p in p_values for k in range(len(p_values)))
        assert near or {i for i, p in enumerate(corrected) if p <= level} == rejected


def test_bound_on_failures():
    """Fails for a two-sided bound or the normal approximation."""
    assert failure_bound(0, 10) == pytest.approx(1 - 0.05**0.1)
    assert failure_bound(10, 10) == 1.0
    assert failure_bound(2, 10) == pytest.approx(stats.beta.ppf(0.95, 3, 8))
    with pytest.raises(ValueError, match="between 0 and the number of seeds"):
        failure_bound(11, 10)


@pytest.mark.parametrize("effects", [[1.0], [1.0, math.nan], [math.inf, 0.0]])
def test_what_cannot_be_tested_is_refused(effects):
    """Fails when a NaN gives a p-value."""
    with pytest.raises(ValueError, match=r"at least two seeds|finite"):
        p_at_least(effects, 0.0)
    with pytest.raises(ValueError, match=r"at least two seeds|finite"):
        interval_of_mean(effects)


def test_band_is_the_interval_at_each_common_point():
    """Fails when points that one seed lacks are averaged over the others, or a diverged seed is left out."""
    x, mean, low, high = band(
        [[(1, 0.0), (2, 1.0), (3, 5.0)], [(1, 2.0), (2, math.nan)], [(1, 4.0), (2, 1.0), (4, 0.0)]]
    )
    assert x == [1.0, 2.0]
    assert mean[0] == 2.0
    assert (low[0], high[0]) == pytest.approx(stats.t.interval(0.95, 2, 2.0, 2.0 / math.sqrt(3)))
    assert all(math.isnan(values[1]) for values in (mean, low, high))
    assert band([]) == ([], [], None, None)
    assert band([[(1, 3.0)]]) == ([1.0], [3.0], None, None)
