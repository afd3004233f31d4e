"""Tests and intervals for effects that are paired by seed, and the correction for many claims.

Public names: :func:`p_at_least`, :func:`p_less`, :func:`interval_of_mean`, :func:`holm`, :func:`failure_bound`,
:func:`band` (mean and interval along learning curves), :func:`common_by_chance`, :data:`LEVEL`.

=====================  ==================================================================================
n                      seeds
d_i                    effect of seed i minus the effect that it is tested against
s                      standard deviation of the effects, with n - 1
resplit, r             size of the test set over that of the training set, where each seed splits one small
                       pool again; 0 where each seed has data of its own; rho / (1 - rho) where effects of two
                       seeds correlate by rho, see ``common_by_chance``
se^2 = s^2 (1/n + r)   Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003
=====================  ==================================================================================

Two tests have to agree, and the p-value is the larger of theirs: Student's t, and on data of its own for each seed the
exact sign-flip test (under the hypothesis each ``d_i`` is as likely as ``-d_i``). The first knows sizes, the second
assumes no distribution. Both are monotone: adding a constant to all effects never makes ``p_at_least`` larger.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEVEL",
    "Band",
    "band",
    "common_by_chance",
    "failure_bound",
    "holm",
    "interval_of_mean",
    "p_at_least",
    "p_less",
]

LEVEL = 0.025
"""Level of each one-sided test; a two-sided interval of 95 % belongs to it."""

_EXACT_UP_TO = 14
"""Seeds up to which all 2^n sign flips are counted; beyond, 2^16 of them are drawn, the same for all."""

_DRAWN = 2**16

Band = tuple[list[float], list[float], list[float] | None, list[float] | None]
"""x, mean, low, high of a learning curve over seeds; low and high are None with a single seed."""


def p_at_least(effects: Sequence[float], threshold: float, *, resplit: float = 0.0) -> float:
    """One-sided p-value of "the mean effect is at least ``threshold``": small when it surely is.

    Args:
        effects: at least two finite numbers, one a seed.
        threshold: the effect to be reached.
        resplit: r, test size over training size where seeds split one pool again; default 0, data of its own for each.

    Returns:
        The larger one of the p-values of Student's t and, with ``resplit=0``, of the sign-flip test.

    Examples:
        >>> round(p_at_least([2.0, 3.0, 3.0, 2.0, 4.0, 3.0], 1.0), 4)  # 2^-6: all six exceed it
        0.0156
    """
    d = _checked(effects) - threshold
    p = _t_test(d, resplit)
    return p if resplit else max(p, _sign_flip(d))


def p_less(effects: Sequence[float], threshold: float, *, resplit: float = 0.0) -> float:
    """One-sided p-value of "the mean effect is less than ``threshold``"; see :func:`p_at_least`."""
    return p_at_least([-effect for effect in effects], -threshold, resplit=resplit)


def interval_of_mean(effects: Sequence[float], *, resplit: float = 0.0) -> tuple[float, float]:
    """The 95 % interval of the mean effect that belongs to the two tests: what neither end of it is rejected by.

    With fewer than six seeds the sign-flip test rejects nothing at this level, and the interval is that of t alone.

    Args:
        effects: as in :func:`p_at_least`.
        resplit: as in :func:`p_at_least`.

    Examples:
        >>> low, high = interval_of_mean([2.0, 3.0, 3.0, 2.0, 4.0])
        >>> round(low, 2), round(high, 2)
        (1.76, 3.84)
    """
    values = _checked(effects)
    n = len(values)
    mean, half = float(values.mean()), _half_width(n) * float(values.std(ddof=1)) * math.sqrt(1 / n + resplit)
    low, high = mean - half, mean + half
    if resplit == 0.0:
        means = np.sort(_subset_means(values))
        # So many subsets may have a mean beyond the end; the empty one counts as beyond every end.
        rank = math.floor(LEVEL * len(_subsets(n))) - (len(_subsets(n)) - len(means))
        if rank >= 0:
            low, high = min(low, float(means[rank])), max(high, float(means[-1 - rank]))
    return low, high


def common_by_chance(seeds: Sequence[int], share: float, *, block: int = 10) -> float:
    """r of seeds from several blocks, each of which deals out the same large set anew.

    Within a block no row is given out twice. Two seeds of different blocks have ``share`` of their rows in common, and
    their effects correlate by that at most: what else makes an effect, such as the initialisation, is each seed's own.

    Args:
        seeds: of the evidence.
        share: of the set, what one seed gets, from 0 to below 1.
        block: seeds of a block; default 10.

    Examples:
        >>> common_by_chance(range(10), 0.03)
        0.0
        >>> round(common_by_chance(range(20), 0.03), 4)  # ten in nineteen of the other seeds are of the other block
        0.016
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be from 0 to below 1, got {share}")
    n = len(seeds)
    sizes = Counter(seed // block for seed in seeds)
    apart = n * n - sum(size * size for size in sizes.values())
    rho = share * apart / max(1, n * (n - 1))
    return rho / (1.0 - rho)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number: each at most the level, and no false verdict among all at more than it.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for done, position in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[position]))
        corrected[position] = largest
    return corrected


def failure_bound(failures: int, seeds: int) -> float:
    """Upper 95 % bound on the rate of failing seeds, after ``failures`` of ``seeds`` failed (Clopper and Pearson).

    Examples:
        >>> round(failure_bound(0, 10), 2)  # ten seeds do not show a failure that befalls one seed in four
        0.26
    """
    if not 0 <= failures <= seeds or seeds < 1:
        raise ValueError(f"failures must lie between 0 and the number of seeds, got {failures} of {seeds}")
    if failures == seeds:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(failures + 1, seeds - failures, 0.95))


def band(curves: Sequence[Sequence[tuple[float, float]]]) -> Band:
    """Mean and 95 % interval (Student's t) at each point of learning curves, one curve a seed.

    Points that not every seed has are left out: a mean over other seeds at other points would jump. Where a seed is not
    finite, mean and interval are NaN, so that the line breaks.

    Args:
        curves: for each seed its (x, y) points.

    Returns:
        x, mean, low, high.

    Examples:
        >>> x, mean, low, high = band([[(1, 0.0), (2, 1.0)], [(1, 2.0), (2, 1.0), (3, 9.0)]])
        >>> x, mean, low[1], high[1]
        ([1.0, 2.0], [1.0, 1.0], 1.0, 1.0)
    """
    if not curves:
        return [], [], None, None
    tables = [{float(x): float(y) for x, y in curve} for curve in curves]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    values = np.array([[table[x] for x in common] for table in tables], dtype=np.float64)
    if len(curves) == 1 or not common:
        return common, values.mean(axis=0).tolist() if common else [], None, None
    mean = values.mean(axis=0)
    half = _half_width(len(curves)) * values.std(axis=0, ddof=1) / math.sqrt(len(curves))
    return common, mean.tolist(), (mean - half).tolist(), (mean + half).tolist()


def _checked(effects: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(effects, dtype=np.float64)
    if len(values) < 2:
        raise ValueError(f"a test needs at least two seeds, got {len(values)}")
    if not np.isfinite(values).all():
        raise ValueError(f"effects must be finite numbers, got {values.tolist()}")
    return values


def _t_test(d: NDArray[np.float64], resplit: float) -> float:
    from scipy.special import stdtr  # here because the import takes 0.2 s

    mean, spread = float(d.mean()), float(d.std(ddof=1))
    if spread <= 1e-15 * float(np.abs(d).max()):  # equal but for rounding: no spread to divide by
        return 0.5 if mean == 0.0 else float(mean < 0.0)
    return float(stdtr(len(d) - 1, -mean / (spread * math.sqrt(1 / len(d) + resplit))))


@lru_cache
def _half_width(n: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - LEVEL))


def _sign_flip(d: NDArray[np.float64]) -> float:
    """Share of sign flips whose sum is at least the sum of ``d``: those whose flipped entries sum to 0 or less."""
    # Sums that would be 0 in exact arithmetic (accuracies are multiples of one sample) must count as 0.
    rounding = 1e-12 * float(np.abs(d).sum())
    return float(np.mean(_subsets(len(d)) @ d <= rounding))


def _subset_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of all subsets but the empty one."""
    subsets = _subsets(len(values))
    sizes = subsets.sum(axis=1)
    filled = sizes > 0
    means: NDArray[np.float64] = (subsets[filled] @ values) / sizes[filled]
    return means


@lru_cache
def _subsets(n: int) -> NDArray[np.float64]:
    """Which entries are flipped, as rows of 0 and 1: all 2^n, or the identity and a fixed draw of 2^16 - 1."""
    if n <= _EXACT_UP_TO:
        return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
    drawn = np.random.default_rng(0).integers(0, 2, size=(_DRAWN, n))
    drawn[0] = 0
    return drawn.astype(np.float64)
