"""What a recipe leaves open: ranges of settings, and the points of them that are tried.

Public names: :class:`Log`, :class:`Uniform`, :class:`OneOf`, :func:`points`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Log", "OneOf", "Range", "Space", "Uniform", "points"]

_DIMENSIONS = 16  # of the sequence that all spaces take their first columns of


@dataclass(frozen=True, slots=True)
class Log:
    """Numbers from ``low`` to ``high``, every order of magnitude as likely as another.

    Args:
        low: above 0.
        high: above ``low``.

    Examples:
        >>> Log(1e-3, 1e-1).at(0.5)
        0.01
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"a logarithmic range needs 0 < low < high, got {self.low} to {self.high}")

    def at(self, u: float) -> float:
        """The number at share ``u`` in [0, 1] of the way, to three digits."""
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")


@dataclass(frozen=True, slots=True)
class Uniform:
    """Numbers from ``low`` to ``high``, all as likely.

    Args:
        low: finite.
        high: above ``low``.

    Examples:
        >>> Uniform(0.5, 0.9).at(0.25)
        0.6
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"a range needs low < high, got {self.low} to {self.high}")

    def at(self, u: float) -> float:
        """The number at share ``u`` in [0, 1] of the way, to three digits."""
        return float(f"{self.low + u * (self.high - self.low):.3g}")


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few values.

    Args:
        values: at least two, numbers or texts.

    Examples:
        >>> OneOf(("paper", "official")).at(0.7)
        'official'
    """

    values: Sequence[float | str]

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(f"a choice needs at least two values, got {list(self.values)}")

    def at(self, u: float) -> float | str:
        """The value at share ``u`` in [0, 1)."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]


Range: TypeAlias = Log | Uniform | OneOf
Space: TypeAlias = Mapping[str, Range]


def points(space: Space, count: int) -> list[dict[str, Any]]:
    """Points spread over a space: scrambled Sobol, always the same, the first ``n`` of them those of ``count=n``.

    Spaces that begin with the same settings get the same values for these, so that no arm has better learning rates to
    choose from than another. More points, as a larger budget buys, keep those that were tried.

    Args:
        space: at most 16 settings, the common ones first.
        count: how many points; a power of 2 spreads best.

    Raises:
        ValueError: fewer than one point, or more than 16 settings.

    Examples:
        >>> for point in points({"lr": Log(1e-3, 1e-1), "alpha": Uniform(0.0, 1.0)}, 2):
        ...     print(sorted(point))
        ['alpha', 'lr']
        ['alpha', 'lr']
    """
    from scipy.stats import qmc

    if count < 1 or len(space) > _DIMENSIONS:
        raise ValueError(f"1 point or more of at most {_DIMENSIONS} settings, got {count} points of {len(space)}")
    whole = 1 << (count - 1).bit_length()
    rows = qmc.Sobol(_DIMENSIONS, scramble=True, rng=0).random(whole)[:count]
    return [{name: values.at(float(u)) for (name, values), u in zip(space.items(), row)} for row in rows]
