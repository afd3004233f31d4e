"""What may be said after a comparison: corrected for shared samples, many candidates, and divergence."""

import math

import pytest

from regularized.evidence.comparison.judging import best_trial, further_splits, judge, recommend
from regularized.evidence.comparison.rates import simulate
from regularized.evidence.comparison.space import Log, OneOf, Uniform, points

GOOD = [10.0, 11.0, 9.5, 10.5, 10.0]
PLAIN = [0.0] * 5


def test_effects_are_paired_and_signed():
    """Fails when the direction is ignored, or arms are compared across splits."""
    judging, selection = {"plain": [1.0, 5.0], "a": [2.0, 6.0]}, {"plain": [0, 0], "a": [1, 1]}
    higher = judge(judging, selection, direction="higher", resplit=0)
    lower = judge(judging, selection, direction="lower", resplit=0)
    assert higher["a"].effects == (1.0, 1.0)
    assert lower["a"].effects == (-1.0, -1.0)
    assert lower["a"].selection_effect == -1.0


def test_shared_samples_widen_the_interval():
    """Fails when splits of one pool are taken for fresh data."""
    values = {"plain": PLAIN, "a": GOOD}
    fresh = judge(values, values, direction="higher", resplit=0.0)["a"].interval
    shared = judge(values, values, direction="higher", resplit=0.25)["a"].interval
    assert shared[0] < fresh[0] < fresh[1] < shared[1]


def test_more_candidates_cost_certainty():
    """Fails when p-values are not corrected for the number of candidates."""
    alone = {"plain": PLAIN, "a": [1.0, 3.0, 2.0, 1.5, 2.5]}
    among = {**alone, **{f"useless{i}": [1.0, -1.0, 0.5, -0.5, 0.0] for i in range(6)}}
    one = judge(alone, alone, direction="higher", resplit=0.0)["a"].p_value
    many = judge(among, among, direction="higher", resplit=0.0)["a"].p_value
    assert many == pytest.approx(7 * one)


def test_divergence_counts_as_the_worst_there_is():
    """Fails when a run that diverged is left out, which would reward techniques that diverge now and then."""
    values = {"plain": PLAIN, "a": [20.0, 20.0, 20.0, 20.0, math.nan]}
    judged = judge(values, values, direction="higher", resplit=0.25)["a"]
    assert judged.effects[4] == 0.0
    assert not judged.holds


def test_the_recommended_is_chosen_on_the_selection_part():
    """Fails when the luckiest number on the judging part decides among those that hold."""
    judging = {"plain": PLAIN, "lucky": [v + 5 for v in GOOD], "solid": GOOD}
    selection = {"plain": PLAIN, "lucky": [1.0] * 5, "solid": [9.0] * 5}
    assert recommend(judge(judging, selection, direction="higher", resplit=0.2)).name == "solid"


def test_nothing_is_recommended_where_nothing_is_certain():
    """Fails when the leader is recommended anyway; it is named, with what would decide."""
    noisy = {"plain": PLAIN, "a": [3.0, -2.0, 2.5, -1.0, 1.5]}
    judged = judge(noisy, noisy, direction="higher", resplit=0.25)
    assert recommend(judged).name is None
    assert recommend(judged).leads == "a"
    worse = {"plain": PLAIN, "a": [-v for v in GOOD]}
    assert recommend(judge(worse, worse, direction="higher", resplit=0.25)).leads is None


def test_further_splits_are_enough_and_not_too_many():
    """Fails when the estimate ignores the correction, or the part of the variance that no split averages out."""
    effects = [1.0, 2.0, 0.5, 1.5]
    more = further_splits(effects, resplit=0.02, candidates=3)
    assert more is not None
    assert more > 0
    assert further_splits(effects, resplit=0.02, candidates=30) > more
    assert further_splits([1.0, -1.5, 1.0, 0.2], resplit=0.25, candidates=3) is None


def test_the_shipped_rule_seldom_recommends_the_useless():
    """Fails when the rule recommends one of seven useless candidates in more than 5 % of comparisons.

    The naive interval does so in a third of them: the simulation can tell.
    """
    rates = {(rate.case, rate.rule): rate.share for rate in simulate(splits=(5,), repetitions=150)}
    assert rates["7 useless candidates", "shipped"] <= 0.05
    assert rates["7 useless candidates", "naive"] > 0.2
    assert rates["one of them helps by 10 points", "shipped"] > 0.1


def test_best_trial():
    """Fails when NaN wins, the direction is ignored, or all failed trials give one."""
    assert best_trial([math.nan, 1.0, 2.0], "higher") == 2
    assert best_trial([math.nan, 1.0, 2.0], "lower") == 1
    assert best_trial([math.nan, math.nan], "lower") is None


def test_every_arm_has_the_same_common_points():
    """Fails when one arm gets other learning rates to choose from than another, or more trials change those before."""
    common = {"lr": Log(1e-3, 1.0), "weight_decay": Log(1e-5, 1e-1)}
    plain = points(common, 8)
    wider = points({**common, "alpha": Uniform(0.0, 1.0), "kind": OneOf(("a", "b"))}, 8)
    assert [{name: p[name] for name in common} for p in wider] == plain
    assert points(common, 3) == plain[:3]
    assert len({p["lr"] for p in plain}) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Log(0.0, 1.0), "0 < low < high"),
        (lambda: Uniform(1.0, 1.0), "low < high"),
        (lambda: OneOf(("a",)), "two values"),
        (lambda: points({"lr": Log(1.0, 2.0)}, 0), "1 point"),
        (lambda: judge({"plain": [1.0]}, {"plain": [1.0]}, direction="higher", resplit=0.1), "two splits"),
        (lambda: judge({"plain": [math.nan] * 2}, {"plain": [1.0] * 2}, direction="higher", resplit=0), "diverged"),
    ],
)
def test_bad_input(make, message):
    """Fails when what cannot be meant is taken."""
    with pytest.raises(ValueError, match=message):
        make()
