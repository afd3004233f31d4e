"""How likely a fresh block of seeds decides what ten left open: said before anybody looks.

Public names: :func:`chances_of_a_verdict`, :class:`Chance`.

What a seed's effect may be is drawn from what has been seen: mean and variance from their posterior under Jeffreys'
prior, (n - 1) s^2 / chi^2 and a normal around the mean; then effects of the new seeds, normal; then the rule of
:mod:`~regularized.evidence.verdicts` judges the whole card. Claims are drawn as if none had an arm in common.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from regularized.evidence.claims import Outcome, Verdict
from regularized.evidence.statistics import common_by_chance
from regularized.evidence.verdicts import Measured, verdicts

__all__ = ["Chance", "chances_of_a_verdict"]


class Chance(NamedTuple):
    """What so many fresh seeds would bring to a claim that is open.

    Attributes:
        claim: its id.
        seeds: how many fresh ones.
        decided: share of the simulated blocks that give another verdict than *open*.
        likeliest: the verdict that came out most often, *open* included.
    """

    claim: str
    seeds: int
    decided: float
    likeliest: Verdict


def chances_of_a_verdict(
    outcomes: Sequence[Outcome], *, seeds: int = 20, share: float = 0.0, repetitions: int = 200, seed: int = 0
) -> list[Chance]:
    """For each claim that is open the chance that a fresh block decides it.

    Args:
        outcomes: all claims of a card, judged: the others count in the correction.
        seeds: how many fresh ones; default 20.
        share: of a large set, what one seed gets, see :class:`~regularized.evidence.experiment.About`; default what
            the outcomes say, or 0.
        repetitions: simulated blocks; default 200, a standard error of at most 3.5 points.
        seed: of the simulation.

    Returns:
        One a claim that is open and has effects of at least two seeds, in order.

    Raises:
        ValueError: fewer seeds than give a verdict.

    Examples:
        >>> from regularized.evidence.claims import Claim
        >>> from regularized.evidence.verdicts import judge
        >>> claim = Claim("better", "It is better.", "accuracy", "higher", "plain", "ours", smallest_effect=1.0)
        >>> values = [2.0, 0.5, 1.8, 2.9, 0.2, 1.9, 1.4, 0.6, 2.2, 1.7]
        >>> seen, = judge([Measured(claim, [0.0] * 10, values, range(10))])
        >>> chance, = chances_of_a_verdict([seen], seeds=30)
        >>> seen.verdict.value, chance.decided > 0.5, chance.likeliest.value
        ('open', True, 'holds')
    """
    if seeds < 10:
        raise ValueError(f"fewer than 10 seeds give no verdict, got {seeds}")
    generator = np.random.default_rng(seed)
    told = [outcome for outcome in outcomes if len(outcome.effects) > 1 and outcome.claim.smallest_effect is not None]
    counts = [dict.fromkeys(Verdict, 0) for _ in told]
    for _ in range(repetitions):
        block = [_drawn(outcome, seeds, share, generator) for outcome in told]
        for count, verdict in zip(counts, verdicts(block), strict=True):
            count[verdict] += 1
    return [
        Chance(outcome.claim.id, seeds, 1.0 - count[Verdict.OPEN] / repetitions, max(count, key=count.__getitem__))
        for outcome, count in zip(told, counts, strict=True)
        if outcome.verdict is Verdict.OPEN and not outcome.problem
    ]


def _drawn(outcome: Outcome, seeds: int, share: float, generator: np.random.Generator) -> Measured:
    """A fresh block of a claim, of effects that could be those of what has been seen."""
    effects = np.asarray(outcome.effects)
    n = len(effects)
    deviation = effects.std(ddof=1) * np.sqrt((n - 1) / generator.chisquare(n - 1))
    mean = generator.normal(effects.mean(), deviation / np.sqrt(n))
    values = generator.normal(mean, deviation, size=seeds)
    about = outcome.about
    common = common_by_chance(range(seeds), share or float(about.get("share", 0.0)))
    # An effect is an improvement, whatever the metric's direction and unit.
    claim = replace(outcome.claim, direction="higher", relative=False)
    resplit = float(about.get("resplit", 0.0)) + common
    return Measured(claim, [0.0] * seeds, values.tolist(), range(seeds), resplit=resplit)
