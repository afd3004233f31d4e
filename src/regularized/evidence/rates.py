"""How often the rule for verdicts errs, and how often it sees what is there: by simulation.

Public names: :func:`simulate` (both tables), :func:`false_verdicts`, :func:`power`, :data:`CASES`, :class:`Rate`,
:func:`save`, :func:`load` (what ``regularized rates --save`` wrote, for pages).

Beside the rule of :mod:`~regularized.evidence.verdicts` stands the first edition's, which it replaced: a bootstrap
interval of five or more seeds, no correction for the number of claims.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from regularized.evidence.claims import Claim, Verdict
from regularized.evidence.verdicts import Measured, judge

__all__ = ["CASES", "Rate", "false_verdicts", "load", "power", "save", "simulate"]

_SAVED = Path(__file__).with_name("rates.json")

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def _normal(generator: np.random.Generator, seeds: int) -> NDArray[np.float64]:
    return generator.normal(size=seeds)


def _skewed(generator: np.random.Generator, seeds: int) -> NDArray[np.float64]:
    """Mean 0, a long tail to the left: now and then a seed does badly."""
    return 1.0 - generator.gamma(1.0, 1.0, size=seeds)


def _failing(generator: np.random.Generator, seeds: int) -> NDArray[np.float64]:
    """Mean 0; one seed in ten fails by ten standard deviations of the others."""
    return np.where(generator.random(seeds) < 0.1, -9.0, 1.0) + generator.normal(size=seeds)


def _resplit(generator: np.random.Generator, seeds: int) -> NDArray[np.float64]:
    """Effects of splits of one pool: half of their variance is the pool's, which more splits do not average out."""
    return generator.normal(size=seeds) + generator.normal()


class _Case(NamedTuple):
    draw: Draw
    resplit: float


CASES: Mapping[str, _Case] = {
    "normal effects": _Case(_normal, 0.0),
    "a long tail to the left": _Case(_skewed, 0.0),
    "a failure in one seed of ten": _Case(_failing, 0.0),
    "one pool split again for every seed": _Case(_resplit, 1.0),
}
"""Distributions of effects with mean 0, and the ratio of test to training size that an experiment would declare."""


class Rate(NamedTuple):
    """A share of simulated cards.

    Attributes:
        case: what was drawn.
        seeds: how many seeds.
        rule: ``"this rule"`` or ``"first edition"``.
        share: how often the verdict came out.
        error: standard error of the share.
    """

    case: str
    seeds: int
    rule: str
    share: float
    error: float


def simulate(*, repetitions: int = 2000) -> list[Rate]:
    """False verdicts at the threshold with ten seeds, and power one to two standard deviations above it.

    Args:
        repetitions: simulated claims for each case, and cards of ten claims for each power a tenth of that.
    """
    rates = false_verdicts(repetitions=repetitions)
    for above in (1.0, 1.5, 2.0):
        rates += power(above=above, repetitions=max(1, repetitions // 10))
    return rates


def save(rates: Sequence[Rate], *, repetitions: int) -> Path:
    """Write rates beside this module, where pages find them."""
    rows = [rate._asdict() for rate in rates]
    _SAVED.write_text(json.dumps({"repetitions": repetitions, "rates": rows}, indent=1) + "\n", encoding="utf-8")
    return _SAVED


def load() -> tuple[int, list[Rate]]:
    """Repetitions and rates that were saved."""
    data = json.loads(_SAVED.read_text(encoding="utf-8"))
    return data["repetitions"], [Rate(**row) for row in data["rates"]]


def false_verdicts(*, seeds: int = 10, repetitions: int = 2000, seed: int = 0) -> list[Rate]:
    """How often *holds* comes out where the mean effect is exactly the smallest that counts.

    Args:
        seeds: number of seeds; the first edition judged from five on.
        repetitions: simulated claims for each case.
        seed: of the simulation.
    """
    rates = []
    for case, (draw, ratio) in CASES.items():
        generator = np.random.default_rng(seed)
        effects = [draw(generator, seeds) for _ in range(repetitions)]
        shares = {
            "this rule": np.mean([_holds(one, ratio) for one in effects]),
            "first edition": np.mean([first_edition(one) >= 0.0 for one in effects]),
        }
        rates += [_rate(case, seeds, rule, float(share), repetitions) for rule, share in shares.items()]
    return rates


def power(*, above: float, claims: int = 10, seeds: int = 10, repetitions: int = 500, seed: int = 0) -> list[Rate]:
    """How often *holds* comes out where the mean effect lies above what counts, after correction for many claims.

    Args:
        above: by how many standard deviations of a seed's effect.
        claims: claims of the card, all alike.
        seeds: number of seeds.
        repetitions: simulated cards.
        seed: of the simulation.
    """
    generator = np.random.default_rng(seed)
    case = f"{above:g} standard deviations above, {claims} claims"
    cards = [[_normal(generator, seeds) + above for _ in range(claims)] for _ in range(repetitions)]
    ours = np.mean([_share_of_card(card) for card in cards])
    first = np.mean([first_edition(one) >= 0.0 for card in cards for one in card])
    shares = {"this rule": ours, "first edition": first}
    return [_rate(case, seeds, rule, float(share), repetitions) for rule, share in shares.items()]


def first_edition(effects: NDArray[np.float64], *, resamples: int = 2000) -> float:
    """Lower end of the first edition's interval: Hesterberg's expanded percentile bootstrap; the lowest of five."""
    n = len(effects)
    if n <= 5:
        return float(effects.min())
    means = _draws(n, resamples) @ effects / n
    return float(np.quantile(means, _expanded_level(n), method="inverted_cdf"))


@cache
def _draws(n: int, resamples: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


@cache
def _expanded_level(n: int) -> float:
    from scipy.special import ndtr, stdtrit

    return float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)))


def _holds(effects: NDArray[np.float64], ratio: float) -> bool:
    return judge([_measured(effects, ratio)])[0].verdict is Verdict.HOLDS


def _share_of_card(card: list[NDArray[np.float64]]) -> float:
    outcomes = judge([_measured(one, 0.0) for one in card])
    return float(np.mean([outcome.verdict is Verdict.HOLDS for outcome in outcomes]))


def _measured(effects: NDArray[np.float64], ratio: float) -> Measured:
    claim = Claim("simulated", "The mean effect is at least 0.", "m", "higher", "a", "b", smallest_effect=0.0)
    return Measured(claim, [0.0] * len(effects), effects.tolist(), range(len(effects)), resplit=ratio)


def _rate(case: str, seeds: int, rule: str, share: float, repetitions: int) -> Rate:
    return Rate(case, seeds, rule, share, math.sqrt(share * (1.0 - share) / repetitions))
