"""What a fresh block would decide, told from what ten seeds left open."""

import dataclasses

import numpy as np
import pytest

from regularized.evidence.claims import Claim, Verdict
from regularized.evidence.outlook import chances_of_a_verdict
from regularized.evidence.verdicts import Measured, judge


def judged(*, mean, counts=1.0, direction="higher", seeds=10, about=None, **how):
    """A claim with an effect of that mean and deviation 1 over the seeds."""
    claim = Claim("c", "s", "m", direction, "a", "b", smallest_effect=counts, **how)
    spread = np.linspace(-1, 1, seeds)
    effects = mean + spread / spread.std(ddof=1)
    sign = 1.0 if direction == "higher" else -1.0
    return judge([Measured(claim, [50.0] * seeds, (50.0 + sign * effects).tolist(), range(seeds), about=about or {})])


def chance(outcomes, **how):
    (told,) = chances_of_a_verdict(outcomes, **how)
    return told


def test_more_seeds_decide_more_and_nothing_is_sure():
    """Fails if the mean that was seen is taken for the true one: then 100 seeds would decide nearly always."""
    open_one = judged(mean=1.4)
    shares = [chance(open_one, seeds=n, repetitions=100).decided for n in (10, 30, 100)]
    assert shares == sorted(shares)
    assert 0.5 < shares[2] < 0.95


def test_direction_and_sign_of_the_effect():
    """Fails if a loss that falls is taken for a loss of quality, or effects are negated."""
    assert chance(judged(mean=1.5, direction="lower"), seeds=40).likeliest is Verdict.HOLDS
    assert chance(judged(mean=0.5), seeds=100, repetitions=50).likeliest is Verdict.SMALLER
    assert chance(judged(mean=0.5), seeds=20).decided == chance(judged(mean=0.5, direction="lower"), seeds=20).decided


def test_blocks_that_have_rows_in_common_decide_less():
    """Fails if what seeds of different blocks have in common is left out, or a pool that is split again."""
    alone = chance(judged(mean=1.5), seeds=40).decided
    assert chance(judged(mean=1.5), seeds=40, share=0.2).decided < alone - 0.1
    assert chance(judged(mean=1.5, about={"share": 0.2}), seeds=40).decided < alone - 0.1
    assert chance(judged(mean=1.5, about={"resplit": 0.5}), seeds=40).decided < alone - 0.1


def test_claims_of_a_card_are_corrected_together():
    """Fails if each claim is judged alone."""
    (one,) = judged(mean=1.5)
    more = [dataclasses.replace(one, claim=dataclasses.replace(one.claim, id=f"c{i}")) for i in range(12)]
    assert (
        max(found.decided for found in chances_of_a_verdict(more, seeds=20, repetitions=60))
        < chance([one], seeds=20).decided
    )


def test_what_is_decided_or_broken_is_left_out():
    """Fails if a claim with a verdict, without runs, or with a problem is foretold."""
    (clear,) = judged(mean=9.0)
    (broken,) = (dataclasses.replace(outcome, problem="diverged") for outcome in judged(mean=1.4))
    assert clear.verdict is Verdict.HOLDS
    assert chances_of_a_verdict([clear, broken]) == []
    with pytest.raises(ValueError, match="fewer than 10 seeds"):
        chances_of_a_verdict([clear], seeds=9)
