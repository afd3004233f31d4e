from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regularized.evidence.claims import Claim, Verdict, count_verdicts
from regularized.evidence.verdicts import Measured, judge

CLAIM = Claim("c", "s", "accuracy", "higher", "plain", "ours", differs=("strength",), smallest_effect=1.0)
NOISE = [-0.4, 0.3, 0.1, -0.2, 0.5, -0.1, 0.2, -0.3, 0.0, -0.1]
ORDER = [Verdict.OPPOSITE, Verdict.NO_EFFECT, Verdict.SMALLER, Verdict.OPEN, Verdict.HOLDS]


def measured(mean, *, noise=1.0, claim=CLAIM, seeds=10, **about):
    effects = [mean + noise * x for x in NOISE[:seeds]]
    return Measured(claim, [70.0] * seeds, [70.0 + effect for effect in effects], range(seeds), **about)


def verdict(*cases):
    return [outcome.verdict for outcome in judge(cases)]


@pytest.mark.parametrize(
    ("mean", "noise", "expected"),
    [
        (3.0, 1.0, Verdict.HOLDS),
        (0.5, 1.0, Verdict.SMALLER),
        (0.0, 1.0, Verdict.NO_EFFECT),
        (-2.0, 1.0, Verdict.OPPOSITE),
        (1.0, 1.0, Verdict.OPEN),
        (3.0, 20.0, Verdict.OPEN),
    ],
)
def test_five_verdicts(mean, noise, expected):
    """Fails when a row of the table is left out, or zero and the threshold are exchanged."""
    assert verdict(measured(mean, noise=noise)) == [expected]


@pytest.mark.parametrize(("mean", "expected"), [(0.5, Verdict.HOLDS), (-1.0, Verdict.OPEN), (-3.0, Verdict.OPPOSITE)])
def test_not_worse_by_more_than(mean, expected):
    """Fails when a promise of "not worse by more than 1" that is broken counts as smaller than promised."""
    assert verdict(measured(mean, claim=replace(CLAIM, smallest_effect=-1.0))) == [expected]


def test_lower_is_better_and_relative():
    """Fails when the sign of the effect, or its scale, follows the metric."""
    claim = replace(CLAIM, direction="lower", relative=True, smallest_effect=0.1)
    case = Measured(claim, [10.0] * 10, [8.0 + 0.1 * x for x in NOISE], range(10))
    (outcome,) = judge([case])
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.effect == pytest.approx(0.2, abs=0.01)


def test_fewer_than_ten_seeds_are_open():
    """Fails when nine seeds, however clear, decide."""
    (outcome,) = judge([measured(50.0, seeds=9)])
    assert outcome.verdict is Verdict.OPEN
    assert "9 seeds: a verdict needs 10" in outcome.problem
    assert outcome.effect == pytest.approx(50.0, abs=0.1)


def test_many_claims_are_corrected_together():
    """Fails without a correction: a claim that passes alone must not pass among twenty-six."""
    alone = measured(3.0)
    assert verdict(alone) == [Verdict.HOLDS]
    assert set(verdict(alone, *[measured(1.0) for _ in range(25)])) == {Verdict.OPEN}


def test_sanity_is_judged_apart():
    """Fails when what is true by construction raises the bar for the claims, or is counted with them."""
    sane = [measured(1.0, claim=replace(CLAIM, id=f"s{i}", kind="sanity")) for i in range(30)]
    outcomes = judge([measured(3.0), *sane])
    assert outcomes[0].verdict is Verdict.HOLDS
    assert count_verdicts(outcomes)[Verdict.HOLDS] == 1
    assert sum(count_verdicts(outcomes).values()) == 1
    assert sum(count_verdicts(outcomes, kind="sanity").values()) == 30


def test_a_claim_with_a_problem_counts_in_the_correction():
    """Fails when a verdict depends on which other run failed."""
    broken = [measured(3.0, problem="a run failed") for _ in range(25)]
    assert verdict(measured(3.0), *broken)[0] is Verdict.OPEN


def test_a_small_pool_split_again_is_less_sure():
    """Fails when ten splits of one pool count as ten samples."""
    assert verdict(measured(1.3)) == [Verdict.HOLDS]
    assert verdict(measured(1.3, resplit=0.6)) == [Verdict.OPEN]


def test_faults_leave_a_claim_open_with_the_reason():
    """Fails when a NaN is dropped, or a relative effect of 0 is infinite."""
    diverged = Measured(CLAIM, [70.0] * 10, [float("nan"), *[75.0] * 9], range(10))
    of_zero = Measured(replace(CLAIM, relative=True), [0.0] * 10, [1.0] * 10, range(10))
    for case, says in ((diverged, "seed 0: nan"), (of_zero, "relative to 0")):
        (outcome,) = judge([case])
        assert outcome.verdict is Verdict.OPEN
        assert says in outcome.problem
        assert outcome.effect is None
    assert verdict(Measured(CLAIM, (), (), ())) == [Verdict.NOT_RUN]


@pytest.mark.parametrize(("arms", "seeds"), [(([1.0], [1.0, 2.0]), range(2)), (([1.0] * 2, [1.0] * 2), (1, 1))])
def test_pairs_must_be_pairs(arms, seeds):
    """Fails when arms of different length, or a seed twice, are judged."""
    with pytest.raises(ValueError, match="claim 'c'"):
        Measured(CLAIM, *arms, seeds)


def test_worst_seed_and_seeds_that_reach():
    """Fails when the worst is the last, or a seed at the threshold does not reach it."""
    (outcome,) = judge([Measured(CLAIM, [0.0] * 10, [3.0, 1.0, -2.0, *[3.0] * 7], range(100, 110))])
    assert outcome.worst_seed == (102, -2.0)
    assert outcome.reaching == 9


@settings(max_examples=60)
@given(
    st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=10, max_size=10),
    st.floats(-2, 2),
    st.floats(0, 4),
    st.lists(st.floats(-3, 3), max_size=3),
)
def test_adding_a_constant_never_moves_a_verdict_downwards(effects, least, more, others):
    """Fails when a method that is better on every seed gets a worse verdict."""
    claim = replace(CLAIM, smallest_effect=round(least, 2))

    def case(shift):
        return Measured(claim, [0.0] * 10, [effect + shift for effect in effects], range(10))

    rest = [measured(mean) for mean in others]
    before, after = (judge([case(shift), *rest])[0].verdict for shift in (0.0, more))
    assert ORDER.index(after) >= ORDER.index(before)


def test_the_order_of_seeds_does_not_show():
    """Fails when the last bit of the effect depends on which seed finished first."""
    effects = list(np.random.default_rng(1).normal(2.0, 1.0, 10))
    forward, backward = (
        judge([Measured(CLAIM, [0.0] * 10, order, range(10))])[0] for order in (effects, effects[::-1])
    )
    assert (forward.effect, forward.p_value, forward.verdict) == (backward.effect, backward.p_value, backward.verdict)
