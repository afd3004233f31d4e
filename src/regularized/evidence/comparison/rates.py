"""How often a comparison recommends something useless, and how often it finds what helps: by simulation.

Each sample of one pool has its own score under each candidate, less that under plain; its mean over all samples that
might ever come is 0 for a useless candidate. Splits of the pool share these scores, and each adds the noise of its own
training. So more splits do not average out what the pool happens to be, which is what a rule must know.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regularized.evidence.comparison.judging import judge, recommend
from regularized.evidence.comparison.problem import Problem
from regularized.evidence.statistics import interval_of_mean

__all__ = ["Rate", "load", "save", "simulate"]

_SAVED = Path(__file__).with_name("rates.json")

Values = Mapping[str, Sequence[float]]


class Rate(NamedTuple):
    """Share of simulated comparisons in which something was recommended.

    Attributes:
        case: what is true.
        splits: in each comparison.
        rule: ``"shipped"``, or ``"naive"``: the best of those whose interval, as if splits were fresh data, is above 0.
        share: of the comparisons.
        repetitions: how many were simulated.
    """

    case: str
    splits: int
    rule: str
    share: float
    repetitions: int


def simulate(
    *, candidates: int = 7, splits: Sequence[int] = (5, 10), repetitions: int = 400, samples: int = 600, seed: int = 0
) -> list[Rate]:
    """Rates of both rules, with useless candidates alone and with one that helps.

    Args:
        candidates: how many.
        splits: numbers of splits.
        repetitions: simulated comparisons for each case.
        samples: of the pool.
        seed: of the simulation.

    Examples:
        >>> [rate.rule for rate in simulate(repetitions=2, splits=(3,))]
        ['shipped', 'naive', 'shipped', 'naive']
    """
    cases = {f"{candidates} useless candidates": 0.0, "one of them helps by 10 points": 10.0}
    rules: Mapping[str, Callable[[Values, Values, float], bool]] = {"shipped": _shipped, "naive": _naive}
    rates = []
    for case, helps in cases.items():
        for count in splits:
            generator = np.random.default_rng(seed)
            hits = dict.fromkeys(rules, 0)
            for _ in range(repetitions):
                judging, selection, resplit = _comparison(generator, candidates, count, samples, helps)
                for rule, recommends in rules.items():
                    hits[rule] += recommends(judging, selection, resplit)
            rates += [Rate(case, count, rule, hit / repetitions, repetitions) for rule, hit in hits.items()]
    return rates


def save(rates: Sequence[Rate]) -> Path:
    """Write rates beside this module, for the documentation."""
    _SAVED.write_text(json.dumps([rate._asdict() for rate in rates], indent=1) + "\n", encoding="utf-8")
    return _SAVED


def load() -> list[Rate]:
    """What :func:`save` wrote, as it ships."""
    return [Rate(**rate) for rate in json.loads(_SAVED.read_text(encoding="utf-8"))]


def _comparison(
    generator: np.random.Generator, candidates: int, splits: int, samples: int, helps: float
) -> tuple[Values, Values, float]:
    """Metrics of all arms in per cent on the judging and the selection part, and r."""
    import torch

    sizes = Problem(torch.zeros(samples, 1), torch.zeros(samples)).sizes()
    # Right (100) under one of plain and candidate and wrong (0) under the other in a fifth of the samples.
    scores = 100.0 * generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(candidates, samples))
    scores[0] += helps
    judging: dict[str, list[float]] = {"plain": [0.0] * splits}
    selection: dict[str, list[float]] = {"plain": [0.0] * splits}
    for candidate in range(candidates):
        judging[str(candidate)], selection[str(candidate)] = [], []
    for _ in range(splits):
        rows = generator.permutation(samples)
        first, second = rows[: sizes["selection"]], rows[sizes["selection"] :][: sizes["judge"]]
        for candidate in range(candidates):
            training = generator.normal(scale=1.0)  # points: another initialisation does as much
            selection[str(candidate)].append(float(scores[candidate, first].mean()) + training)
            judging[str(candidate)].append(float(scores[candidate, second].mean()) + training)
    return judging, selection, sizes["judge"] / sizes["train"]


def _shipped(judging: Values, selection: Values, resplit: float) -> bool:
    judged = judge(judging, selection, direction="higher", resplit=resplit)
    return recommend(judged).name is not None


def _naive(judging: Values, selection: Values, resplit: float) -> bool:
    return any(interval_of_mean(values)[0] > 0 for arm, values in judging.items() if arm != "plain")
