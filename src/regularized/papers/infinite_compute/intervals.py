"""How sure an asymptote is: three numbers fitted to four or five points leave little to judge by.

Stands on SciPy, and so not beside the law itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student

from regularized.mechanisms.ranges import allowed, between
from regularized.overfitting.infinite_compute.law import PowerLaw, least_squares

__all__ = ["FittedLaw", "fit_with_interval"]


@dataclass(frozen=True, slots=True)
class FittedLaw:
    """A law with what its points say about the asymptote.

    Args:
        law: the least squares.
        interval: of the asymptote, at ``level``; it ends at 0, and reaches 0 where the points do not bound it below.
        level: of the interval.
        leave_one_out: least and largest asymptote when one point is left out.
    """

    law: PowerLaw
    interval: tuple[float, float]
    level: float
    leave_one_out: tuple[float, float]

    def __str__(self) -> str:
        """The asymptote in a line."""
        (low, high), (least, most) = self.interval, self.leave_one_out
        return (
            f"C = {self.law.C:.3f}, {self.level:.0%} interval {low:.3f} to {high:.3f}, with one point left out "
            f"{least:.3f} to {most:.3f}"
        )


@allowed(level=between(0.0, 1.0, "()"))
def fit_with_interval(x: Sequence[float], y: Sequence[float], *, level: float = 0.95) -> FittedLaw:
    """Fit ``A / x^B + C`` and say how sure C is.

    The interval is that of the profile likelihood: all C for which the best A and B leave a sum of squares of at most
    ``(1 + t^2 / (n - 3))`` times the least, with the errors of the points equal, independent and normal, and their size
    taken from the fit. It is not symmetric, as the usual one from the covariance would be: a flat tail bounds C from
    above more than from below.

    Args:
        x: four or more sizes, see :meth:`~regularized.overfitting.infinite_compute.law.PowerLaw.fit`.
        y: their losses, falling.
        level: of the interval; default 0.95.

    Raises:
        ValueError: fewer than four points, which leave nothing to judge the fit by; or as of ``PowerLaw.fit``.

    Examples:
        >>> x = [0.15, 0.3, 0.6, 1.4]
        >>> print(fit_with_interval(x, [0.05 / n**1.02 + 3.43 for n in x]))
        C = 3.430, 95% interval 3.430 to 3.430, with one point left out 3.430 to 3.430
    """
    if len(x) < 4:
        raise ValueError(
            f"an interval needs four points or more, got {len(x)}: three are met exactly; "
            "PowerLaw.fit gives the law alone"
        )
    law = PowerLaw.fit(x, y)
    sizes, losses = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    logs = np.log(sizes / np.exp(np.log(sizes).mean()))

    def rest(asymptote: float) -> float:
        """Sum of squares that is left with this asymptote: the least over exponents, by closing in on it."""
        low, high = 1e-3, 64.0
        for _ in range(6):
            exponents = np.geomspace(low, high, 200)
            powers = np.exp(-exponents[:, None] * logs)
            heights = np.maximum(powers @ (losses - asymptote) / (powers**2).sum(axis=1), 0.0)
            left = ((heights[:, None] * powers + asymptote - losses) ** 2).sum(axis=1)
            best = int(left.argmin())
            low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, 199)]
        return float(left.min())

    n = len(sizes)
    least = max(float(((law.A / sizes**law.B + law.C - losses) ** 2).sum()), rest(law.C))
    limit = least * (1 + student.ppf(0.5 + level / 2, n - 3) ** 2 / (n - 3)) + 1e-24 * float(losses @ losses)

    def beyond(asymptote: float) -> float:
        return float(rest(asymptote) - limit)

    low = 0.0 if law.C == 0 or beyond(0.0) <= 0 else float(brentq(beyond, 0.0, law.C, xtol=1e-9))
    top = float(losses.max())
    high = float(brentq(beyond, law.C, top, xtol=1e-9)) if beyond(top) > 0 else top
    without = [least_squares(np.delete(sizes, i).tolist(), np.delete(losses, i).tolist()).C for i in range(n)]
    return FittedLaw(law, (low, high), level, (min(without), max(without)))
