"""The rule by which claims get their verdicts, from effects that are paired by seed.

Public names: :func:`judge` (the claims of a card with what was measured for each), :func:`verdicts` (these alone),
:class:`Measured`, :data:`MINIMUM_SEEDS`.

Four one-sided tests are made for each claim: is the mean effect surely at least the smallest that counts, surely less,
surely above zero, surely below zero. "Surely" means that the p-value, corrected by Holm over the claims of the card, is
at most 2.5 %. The verdict follows from the answers; the rows exclude each other and leave nothing out:

===========================  =====================================================================
**holds**                    surely at least what counts
**smaller than promised**    surely less than what counts, surely above zero
**no effect shown**          surely less than what counts, surely on neither side of zero
**opposite**                 surely less than what counts, surely below zero
**open**                     surely neither, or fewer seeds than were declared, or fewer than ten
===========================  =====================================================================

For a claim of "not worse by more than" (what counts is zero or less), surely less than that is surely below zero:
*opposite*. A claim of kind ``"sanity"`` is judged alone and is no part of the correction.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regularized.evidence.claims import Claim, Outcome, Verdict
from regularized.evidence.statistics import LEVEL, holm, interval_of_mean, p_at_least, p_less

__all__ = ["MINIMUM_SEEDS", "Measured", "judge", "verdicts"]

MINIMUM_SEEDS = 10
"""Fewer seeds give no verdict but ``open``: with five, one seed decides what the interval is."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A claim with the values of its two arms: entry i of both comes from the same seed.

    Args:
        claim: what is judged.
        baseline: metric of the baseline arm for each seed.
        method: metric of the method arm for each seed.
        seeds: the seeds.
        resplit: test size over training size where each seed splits one pool again; default 0, data of its own.
        about: what was measured on, see :class:`~regularized.evidence.experiment.About`.
        toy: whether that is small where the paper's is not.
        problem: why there can be no verdict; empty (default) where there can.

    Raises:
        ValueError: lengths differ, or a seed is given twice.
    """

    claim: Claim
    baseline: Sequence[float]
    method: Sequence[float]
    seeds: Sequence[int]
    resplit: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)
    toy: bool = False
    problem: str = ""

    def __post_init__(self) -> None:
        claim = self.claim
        if not len(self.baseline) == len(self.method) == len(self.seeds):
            raise ValueError(
                f"claim {claim.id!r}: effects are paired by seed and need equally many values, got "
                f"{len(self.baseline)} of arm {claim.baseline!r}, {len(self.method)} of arm {claim.method!r} and "
                f"{len(self.seeds)} seeds"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"claim {claim.id!r}: each seed counts once, got {list(self.seeds)}")

    @property
    def fault(self) -> str:
        """Why these numbers cannot be judged although they are there; empty where they can."""
        claim = self.claim
        for arm, values in ((claim.baseline, self.baseline), (claim.method, self.method)):
            if bad := [(seed, value) for seed, value in zip(self.seeds, values) if not math.isfinite(value)]:
                shown = ", ".join(f"seed {seed}: {value}" for seed, value in bad)
                return (
                    f"{claim.metric!r} of arm {arm!r} is not finite ({shown}); a seed that diverged is a result and "
                    "cannot be left out: lower the learning rate of both arms, or measure a metric that exists"
                )
        if claim.relative and 0 in self.baseline:
            return (
                f"an effect relative to 0 does not exist; {claim.metric!r} of {claim.baseline!r} is "
                f"{list(map(float, self.baseline))}; leave out relative = true"
            )
        return ""

    @property
    def effects(self) -> list[float]:
        """Improvement of each seed; none where there is a fault."""
        if self.fault:
            return []
        return [float(self.claim.effect(b, m)) for b, m in zip(self.baseline, self.method)]


def judge(measured: Sequence[Measured]) -> list[Outcome]:
    """Judge the claims of a card together.

    Args:
        measured: all claims of one card at one scale, those with problems too: each counts in the correction, so that
            a verdict does not depend on which runs failed.

    Returns:
        An outcome for each, in order.

    Examples:
        >>> claim = Claim("c", "s", "accuracy", "higher", "plain", "ours", smallest_effect=1.0)
        >>> gains = [2.0, 3.0, 3.0, 2.0, 2.0, 2.0, 3.0, 4.0, 2.0, 3.0]
        >>> outcome, = judge([Measured(claim, [70.0] * 10, [70.0 + gain for gain in gains], range(10))])
        >>> outcome.verdict.value, outcome.effect, outcome.p_value
        ('holds', 2.6, 0.0009765625)
    """
    return [_outcome(m, p) for m, p in zip(measured, _corrected(measured))]


def verdicts(measured: Sequence[Measured]) -> list[Verdict]:
    """The verdicts of :func:`judge` alone, which are cheap: no intervals. For simulations.

    Args:
        measured: claims of one card, of enough seeds each and with nothing wrong.

    Examples:
        >>> claim = Claim("c", "s", "accuracy", "higher", "plain", "ours", smallest_effect=1.0)
        >>> verdicts([Measured(claim, [70.0] * 10, [73.0] * 10, range(10))])[0].value
        'holds'
    """
    return [_verdict(p, m.claim.smallest_effect or 0.0) for m, p in zip(measured, _corrected(measured))]


@dataclass(frozen=True, slots=True)
class _Answers:
    """Corrected p-values of the four questions."""

    enough: float
    less: float
    above_zero: float
    below_zero: float


def _corrected(measured: Sequence[Measured]) -> list[_Answers]:
    """Of the claims together; of a sanity check by itself."""
    together = [m for m in measured if m.claim.kind == "claim"]
    corrected = dict(zip(map(id, together), _answers(together)))
    return [corrected[id(m)] if id(m) in corrected else _answers([m])[0] for m in measured]


def _answers(measured: Sequence[Measured]) -> list[_Answers]:
    def ask(test: Callable[..., float], threshold: Callable[[Claim], float | None]) -> list[float]:
        return holm([_p_value(m, test, threshold(m.claim)) for m in measured])

    columns = (
        ask(p_at_least, lambda claim: claim.smallest_effect),
        ask(p_less, lambda claim: claim.smallest_effect),
        ask(p_at_least, lambda claim: 0.0),
        ask(p_less, lambda claim: 0.0),
    )
    return [_Answers(*row) for row in zip(*columns)]


def _p_value(m: Measured, test: Callable[..., float], threshold: float | None) -> float:
    effects = m.effects
    if threshold is None or m.problem or len(effects) < 2:
        return 1.0
    return test(effects, threshold, resplit=m.resplit)


def _outcome(m: Measured, p: _Answers) -> Outcome:
    claim, effects, n = m.claim, m.effects, len(m.effects)
    problem = "; ".join(text for text in (m.problem, m.fault) if text)
    if n == 0:
        verdict = Verdict.OPEN if m.fault else Verdict.NOT_RUN
        return Outcome(claim, verdict, seeds=tuple(m.seeds), about=m.about, toy=m.toy, problem=problem)
    # The order of the seeds must not show, not even in the last bit: fsum is exact.
    mean = math.fsum(effects) / n
    least = None if n < 2 or problem else claim.smallest_effect
    if not problem and n < MINIMUM_SEEDS:
        problem = f"{n} seeds: a verdict needs {MINIMUM_SEEDS}"
    return Outcome(
        claim,
        Verdict.OPEN if least is None or problem else _verdict(p, least),
        effect=mean,
        interval=interval_of_mean(effects, resplit=m.resplit) if n >= 2 else None,
        p_value=None if least is None else p.enough if mean >= least else p.less,
        effects=effects,
        seeds=tuple(m.seeds),
        about=m.about,
        toy=m.toy,
        problem=problem,
    )


def _verdict(p: _Answers, least: float) -> Verdict:
    if p.enough <= LEVEL:
        return Verdict.HOLDS
    if p.less > LEVEL:
        return Verdict.OPEN
    if least <= 0 or p.below_zero <= LEVEL:
        return Verdict.OPPOSITE
    return Verdict.SMALLER if p.above_zero <= LEVEL else Verdict.NO_EFFECT
