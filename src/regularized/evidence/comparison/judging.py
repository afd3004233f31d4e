"""From runs to what may be said: honest about splits that share their samples, and about many tries.

==========================  ============================================================================
S                           splits, each of which deals the same samples again
trial of an arm in a split  the one whose validation metric is best there: tuned inside each split
d_s                         its metric on the judging part, less that of ``plain`` in the same split
se² = s² (1 / S + r)        Nadeau and Bengio 2003; r the size of the judging over that of the training part
p                           one-sided, Student's t, by Holm's rule over all candidates
==========================  ============================================================================

The intervals are those of one candidate; the verdicts are corrected for their number. Which of the techniques that hold
is recommended is decided on the selection part, so that what is reported of it is not the luckiest of several numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regularized.evidence.statistics import LEVEL, holm, interval_of_mean, p_at_least

__all__ = ["Judged", "Recommendation", "best_trial", "further_splits", "judge", "recommend"]

_FAR = 1000  # splits


@dataclass(frozen=True, slots=True)
class Judged:
    """What the splits say of one candidate.

    Args:
        effects: in each split, on the judging part; positive is better than plain.
        selection_effect: mean effect on the selection part.
        interval: of the mean effect, 95 %.
        p_value: of "it is no better than plain", corrected for all candidates.
        further_splits: after how many more splits the effect, if it stays as it is, would be certain; 0 where it is,
            None where no number of splits of these data would do.
    """

    effects: tuple[float, ...]
    selection_effect: float
    interval: tuple[float, float]
    p_value: float
    further_splits: int | None

    @property
    def effect(self) -> float:
        """Mean over the splits."""
        return math.fsum(self.effects) / len(self.effects)

    @property
    def holds(self) -> bool:
        """Whether it surely is better than plain."""
        return self.p_value < LEVEL


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do.

    Args:
        name: the technique; None where nothing is surely better.
        leads: the candidate with the best effect on the selection part, certain or not; None where none is above plain.
    """

    name: str | None
    leads: str | None


def best_trial(values: Sequence[float], direction: str) -> int | None:
    """Position of the best of the trials' validation metrics; None where all diverged.

    Examples:
        >>> best_trial([0.5, float("nan"), 0.7, 0.7], "higher")
        2
    """
    sign = 1.0 if direction == "higher" else -1.0
    known = [position for position, value in enumerate(values) if math.isfinite(value)]
    return max(known, key=lambda position: sign * values[position], default=None)


def judge(
    judging: Mapping[str, Sequence[float]],
    selection: Mapping[str, Sequence[float]],
    *,
    baseline: str = "plain",
    direction: str,
    resplit: float,
) -> dict[str, Judged]:
    """Judge all candidates together.

    Args:
        judging: for each arm its metric on the judging part, one number a split; NaN counts as the worst that any arm
            had in any split, since a technique that diverges with its best setting is no good.
        selection: likewise on the selection part.
        baseline: the arm that the others are compared with.
        direction: ``"higher"`` or ``"lower"`` is better.
        resplit: r, size of the judging part over that of the training part.

    Raises:
        ValueError: fewer than two splits.

    Examples:
        >>> values = {"plain": [80.0, 82.0, 81.0, 80.5], "better": [88.0, 89.5, 88.6, 88.4]}
        >>> judged = judge(values, values, direction="higher", resplit=0.25)["better"]
        >>> round(judged.effect, 2), judged.holds
        (7.75, True)
    """
    judging, selection = _without_nan(judging, direction), _without_nan(selection, direction)
    if len(judging[baseline]) < 2:
        raise ValueError("a comparison needs at least two splits; five say something")
    sign = 1.0 if direction == "higher" else -1.0

    def effects_of(values: Mapping[str, Sequence[float]], arm: str) -> list[float]:
        return [sign * (value - plain) for value, plain in zip(values[arm], values[baseline], strict=True)]

    candidates = [arm for arm in judging if arm != baseline]
    effects = {arm: effects_of(judging, arm) for arm in candidates}
    corrected = holm([p_at_least(effects[arm], 0.0, resplit=resplit) for arm in candidates])
    judged = {}
    for arm, p in zip(candidates, corrected):
        on_selection = effects_of(selection, arm)
        judged[arm] = Judged(
            effects=tuple(effects[arm]),
            selection_effect=math.fsum(on_selection) / len(on_selection),
            interval=interval_of_mean(effects[arm], resplit=resplit),
            p_value=p,
            further_splits=0
            if p < LEVEL
            else further_splits(effects[arm], resplit=resplit, candidates=len(candidates)),
        )
    return judged


def recommend(judged: Mapping[str, Judged]) -> Recommendation:
    """Of those that hold the one with the best effect on the selection part; none where nothing holds."""
    certain = [arm for arm, of in judged.items() if of.holds]
    above = [arm for arm, of in judged.items() if of.selection_effect > 0 and of.effect > 0]

    def on_selection(arm: str) -> float:
        return judged[arm].selection_effect

    return Recommendation(
        name=max(certain, key=on_selection, default=None),
        leads=max(certain or above, key=on_selection, default=None),
    )


def further_splits(effects: Sequence[float], *, resplit: float, candidates: int) -> int | None:
    """After how many more splits an effect as it is now would hold as the only one of so many candidates.

    Splits of the same samples do not average everything out: with r > 0 the standard error never falls below
    ``s sqrt(r)``, and then only more data would tell.

    Args:
        effects: so far, one a split.
        resplit: r.
        candidates: that share the level.

    Returns:
        How many more, at most 1,000; None where that is not enough, or the effect is not positive.

    Examples:
        >>> further_splits([1.0, 2.0, 0.5], resplit=0.1, candidates=2)
        4
        >>> further_splits([1.0, -2.0, 1.5], resplit=0.25, candidates=2) is None
        True
    """
    from scipy.special import stdtr

    n = len(effects)
    mean = math.fsum(effects) / n
    spread = math.sqrt(math.fsum((effect - mean) ** 2 for effect in effects) / (n - 1))
    if mean <= 0:
        return None
    if spread == 0:
        return 0
    for total in range(n, n + _FAR + 1):
        t = mean / (spread * math.sqrt(1.0 / total + resplit))
        if candidates * float(stdtr(total - 1, -t)) < LEVEL:
            return max(total - n, 1)
    return None


def _without_nan(values: Mapping[str, Sequence[float]], direction: str) -> dict[str, list[float]]:
    known = [value for of_arm in values.values() for value in of_arm if math.isfinite(value)]
    if not known:
        raise ValueError("every run diverged; lower the learning rates, or look at the data")
    worst = min(known) if direction == "higher" else max(known)
    return {arm: [value if math.isfinite(value) else worst for value in of_arm] for arm, of_arm in values.items()}
