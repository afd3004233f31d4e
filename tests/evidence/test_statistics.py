import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regularized.evidence import statistics
from regularized.evidence.claims import Claim, Verdict
from regularized.evidence.statistics import band, expanded_level, interval_of_mean, judge

numbers = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=7)


def claim(**changes):
    values = {"id": "c", "statement": "s", "metric": "m", "direction": "higher", "baseline": "a", "method": "b"}
    return Claim(**(values | {"smallest_effect": 1.0} | changes))


def every_resample_mean(values):
    return np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))])


def test_covers_the_mean_of_five_normal_seeds_where_the_plain_percentile_does_not():
    """Fails when the expansion is lost: the plain percentile interval covers 84 %, a verdict from it would be hasty."""
    samples = np.random.default_rng(0).normal(size=(5, 4000))
    low, high = statistics._intervals(samples, 0.95, None)
    expanded = np.mean((low <= 0) & (high >= 0))

    def plain(column):
        means = every_resample_mean(column)
        return np.quantile(means, 0.025) <= 0 <= np.quantile(means, 0.975)

    percentile = np.mean([plain(column) for column in samples.T[:500]])
    # Exactly 1 - 2 / 2^5 = 93.75 % for five seeds of any symmetric distribution; 4000 samples give +- 0.8 %.
    assert 0.927 < expanded < 0.948
    assert percentile < 0.88


@pytest.mark.parametrize("count", [6, 9])
def test_covers_with_more_seeds_enumerated_and_drawn(count):
    """Fails when the level for more seeds, or the drawn resamples, are off."""
    samples = np.random.default_rng(1).normal(size=(count, 1500))
    low, high = statistics._intervals(samples, 0.95, np.random.default_rng(2))
    assert 0.92 < np.mean((low <= 0) & (high >= 0)) < 0.965


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_equals_the_interval_from_all_ordered_resamples(count, confidence):
    """Fails when a multinomial weight is wrong: here every one of the n^n resamples is written out."""
    values = np.random.default_rng(count).normal(size=count).tolist()
    means = every_resample_mean(values)
    position = np.arange(1, len(means) + 1) / len(means)
    level = expanded_level(count, confidence)
    first = int(np.argmax(position >= level)) if level >= (count + 1) / count**count else 0
    expected = (means[first], means[len(means) - 1 - first])
    assert interval_of_mean(values, confidence=confidence) == pytest.approx(expected)


def test_a_catalogue_draws_its_resamples_once():
    """Fails when each claim draws ten thousand resamples of its own: half a second for every command."""
    statistics._default_resamples.cache_clear()
    for shift in range(3):
        interval_of_mean([float(shift), *range(12)])
    assert statistics._default_resamples.cache_info().misses == 1


def test_the_generator_decides_and_nothing_else():
    """Fails when resampling uses the global generator or ignores the one that is passed (as in rliable)."""
    values = np.random.default_rng(3).exponential(size=12).tolist()

    def interval(seed, global_seed):
        np.random.seed(global_seed)  # noqa: NPY002
        return interval_of_mean(values, generator=np.random.default_rng(seed))

    assert interval(0, 0) == interval(0, 1)
    assert interval(0, 0) != interval(1, 0)
    assert interval_of_mean(values) == interval_of_mean(values) == interval(0, 2)  # the remembered draws are seed 0's


@given(numbers, st.integers(0, 6), st.floats(0, 50))
def test_a_better_seed_never_lowers_an_end(values, which, gain):
    """Fails when ends mix levels or spread: raising one seed's effect must not turn "holds" into less."""
    raised = list(values)
    raised[which % len(values)] += gain
    low, high = interval_of_mean(values)
    new_low, new_high = interval_of_mean(raised)
    assert new_low >= low - 1e-9
    assert new_high >= high - 1e-9


@given(numbers, st.floats(-1e3, 1e3), st.floats(0.01, 100), st.randoms())
def test_moves_and_stretches_with_the_values_in_any_order(values, shift, factor, random):
    """Fails when the interval depends on units or on the order of the seeds."""
    low, high = interval_of_mean(values)
    shuffled = [shift + factor * value for value in values]
    random.shuffle(shuffled)
    assert interval_of_mean(shuffled) == pytest.approx((shift + factor * low, shift + factor * high), abs=1e-6)
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


@given(numbers)
def test_more_confidence_never_narrows(values):
    """Fails when the level is applied to the wrong side."""
    inner, outer = interval_of_mean(values, confidence=0.8), interval_of_mean(values, confidence=0.99)
    assert outer[0] <= inner[0] <= inner[1] <= outer[1]


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        ([3.0, 4.0, 5.0, 3.5, 4.5], Verdict.HOLDS),
        ([1.0, 2.0, 3.0, 2.0, 3.0], Verdict.HOLDS),  # the lowest exactly at what counts
        ([0.5, 0.9, -1.0, 0.0, 0.2], Verdict.DOES_NOT_HOLD),
        ([0.5, 1.0, -1.0, 0.0, 0.2], Verdict.UNDECIDED),  # the highest exactly at what counts
        ([0.5, 3.0, 2.0, 4.0, 5.0], Verdict.UNDECIDED),
        ([30.0, 40.0, 50.0, 35.0], Verdict.UNDECIDED),  # four seeds, however clear
    ],
)
def test_verdict_follows_the_rule(method, verdict):
    """Fails when a bound is strict where it must not be, or fewer than five seeds get a verdict."""
    count = len(method)
    assert judge(claim(), baseline=[0.0] * count, method=method, seeds=range(count)).verdict is verdict


def test_lower_is_better_and_relative_effects():
    """Fails when the sign or the baseline's share is wrong: an error falling from 4 to 3 is an improvement of 25 %."""
    outcome = judge(
        claim(direction="lower", kind="relative", smallest_effect=0.2),
        baseline=[4.0] * 5,
        method=[3.0] * 5,
        seeds=range(5),
    )
    assert (outcome.effect, outcome.interval, outcome.verdict) == (0.25, (0.25, 0.25), Verdict.HOLDS)


def test_one_seed_and_none_have_no_interval():
    """Fails when a single seed gets an interval of width zero, which would look certain."""
    one = judge(claim(), baseline=[0.0], method=[9.0], seeds=[0])
    assert (one.effect, one.interval, one.verdict) == (9.0, None, Verdict.UNDECIDED)
    assert judge(claim(), baseline=[], method=[], seeds=[]).verdict is Verdict.NOT_RUN
    without = judge(claim(smallest_effect=None), baseline=[0.0] * 5, method=[9.0] * 5, seeds=range(5))
    assert without.verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("baseline", "method", "seeds", "says"),
    [
        ([0.0] * 5, [1.0, 1.0, float("nan"), 1.0, 1.0], range(5), r"'m' of arm 'b' is not finite \(seed 2: nan\)"),
        ([float("inf")] + [0.0] * 4, [1.0] * 5, range(5), r"arm 'a' is not finite \(seed 0: inf\)"),
        ([0.0] * 4, [1.0] * 5, range(5), "4 of arm 'a', 5 of arm 'b' and 5 seeds"),
        ([0.0] * 2, [1.0] * 2, [3, 3], r"each seed counts once, got \[3, 3\]"),
    ],
)
def test_bad_values_are_named(baseline, method, seeds, says):
    """Fails when a diverged seed slips into a mean, or pairs are formed from unequal lists."""
    with pytest.raises(ValueError, match=says):
        judge(claim(), baseline=baseline, method=method, seeds=seeds)


def test_a_relative_effect_of_nothing_is_an_error():
    """Fails when a division by zero becomes an infinite effect that "holds"."""
    with pytest.raises(ValueError, match="relative to 0 does not exist"):
        judge(claim(kind="relative"), baseline=[0.0] * 5, method=[1.0] * 5, seeds=range(5))


@pytest.mark.parametrize("bad", [{"count": 1}, {"count": 5, "confidence": 1.0}, {"count": 5, "confidence": 0.0}])
def test_levels_out_of_range_are_errors(bad):
    """Fails when a nonsensical level is computed without a word."""
    with pytest.raises(ValueError, match=r"at least two|\(0, 1\)"):
        expanded_level(**bad)


def test_band_keeps_to_points_that_all_seeds_have_and_breaks_where_one_diverged():
    """Fails when a mean is taken over other seeds at other points, or a NaN is averaged away."""
    curves = [[(x, float(x * seed)) for x in range(4 + seed)] for seed in range(5)]
    curves[4][2] = (2, float("nan"))
    x, mean, low, high = band(curves)
    assert x == [0, 1, 2, 3]
    assert mean[1] == 2.0
    assert (low[1], high[1]) == (0.0, 4.0)
    assert np.isnan([mean[2], low[2], high[2]]).all()
    assert mean[3] == 6.0
    assert band([]) == ([], [], None, None)
    assert band([[(0, 1.0)]]) == ([0.0], [1.0], None, None)


def test_importing_statistics_is_light():
    """Fails when listing the catalogue would load torch, plots or scikit-learn."""
    code = (
        "import sys, regularized.evidence.claims, regularized.evidence.statistics, regularized.evidence.ledger;"
        "heavy = {'torch', 'rich', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
