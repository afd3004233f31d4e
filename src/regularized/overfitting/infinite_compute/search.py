"""What is set around runs: epochs, rate and decay by coordinate descent, its certificate, and the member's settings.

The paper tunes the three together for each size of model and of data. A point is *certified* when none of its
neighbours on the grid, one step along one axis, is better: seven runs, fewer at an edge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TypeAlias

__all__ = ["GRIDS", "Certificate", "Settings", "box", "certify", "coordinate_descent", "member_settings"]

Settings: TypeAlias = Mapping[str, float]
"""A value for each axis, such as ``{"epochs": 16, "lr": 3e-3, "weight_decay": 1.6}``."""

Grids: TypeAlias = Mapping[str, Sequence[float]]

GRIDS: Grids = MappingProxyType(
    {
        "epochs": (1, 2, 4, 8, 16, 32, 64),
        "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "weight_decay": (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
    }
)
"""The paper's grids."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a search has found.

    Args:
        center: the point in question.
        losses: every run, in the order in which it was made.

    Attributes:
        certified: no neighbour has a lower loss.
        better: neighbours that have, the best first.
    """

    center: Settings
    losses: tuple[tuple[Settings, float], ...]
    better: tuple[Settings, ...]

    @property
    def certified(self) -> bool:
        """Whether no neighbour has a lower loss."""
        return not self.better

    @property
    def loss(self) -> float:
        """The loss at the centre."""
        return next(loss for settings, loss in self.losses if settings == self.center)


def box(center: Settings, grids: Grids = GRIDS) -> list[dict[str, float]]:
    """The centre, then for each axis its neighbours below and above; beyond an edge stands the centre itself.

    Args:
        center: a value of the grid for each axis.
        grids: the axes, values rising.

    Raises:
        ValueError: the axes differ, a grid does not rise, or the centre is not on it.

    Examples:
        >>> [point["lr"] for point in box({"lr": 3.0}, {"lr": (1.0, 3.0)})]
        [3.0, 1.0, 3.0]
    """
    if center.keys() != grids.keys():
        raise ValueError(f"the centre needs a value for each axis: {sorted(grids)}; got {sorted(center)}")
    points = [dict(center)]
    for axis, values in grids.items():
        at = _position(axis, center[axis], values)
        points += [{**center, axis: values[i]} for i in (max(at - 1, 0), min(at + 1, len(values) - 1))]
    return points


def certify(run: Callable[[dict[str, float]], float], center: Settings, grids: Grids = GRIDS) -> Certificate:
    """Run a point and its neighbours, each once.

    Args:
        run: from settings to a validation loss, averaged over seeds where that is affordable.
        center: the point.
        grids: the axes; default :data:`GRIDS`.

    Raises:
        ValueError: as of :func:`box`, or a loss is NaN.

    Examples:
        >>> found = certify(lambda s: (s["lr"] - 2.0) ** 2, {"lr": 3.0}, {"lr": (1.0, 2.0, 3.0)})
        >>> found.certified, found.better
        (False, ({'lr': 2.0},))
    """
    return _Runs(run).certificate(center, grids)


def coordinate_descent(run: Callable[[dict[str, float]], float], start: Settings, grids: Grids = GRIDS) -> Certificate:
    """From neighbour to better neighbour until the point is certified; no settings are run twice.

    Args:
        run: from settings to a validation loss.
        start: where to begin, such as the best settings of the next smaller model.
        grids: the axes; default :data:`GRIDS`.

    Returns:
        The certificate of where it ended, with every run.

    Raises:
        ValueError: as of :func:`certify`.

    Examples:
        >>> axes = {"lr": (1.0, 2.0, 3.0), "weight_decay": (0.0, 1.0, 2.0, 4.0)}
        >>> def run(s):
        ...     return (s["lr"] - 1.0) ** 2 + (s["weight_decay"] - 2.0) ** 2
        >>> coordinate_descent(run, {"lr": 3.0, "weight_decay": 0.0}, axes).center
        {'lr': 1.0, 'weight_decay': 2.0}
    """
    runs = _Runs(run)
    center = dict(start)
    box(center, grids)
    while True:
        found = runs.certificate(center, grids)
        if found.certified:
            return found
        center = dict(found.better[0])


def member_settings(single: Settings, *, most_epochs: float = 128, least_decay: float = 0.1) -> dict[str, float]:
    """Settings of an ensemble's members from the best ones of a single model: twice the epochs, half the decay.

    Members may overfit more than one model alone: what they learn by heart differs, and averages out.

    Args:
        single: with ``epochs`` and ``weight_decay``; all else stays.
        most_epochs: where doubling ends; default 128, the official experiments'.
        least_decay: where halving ends; default 0.1, theirs. A decay that is already below stays.

    Raises:
        ValueError: ``epochs`` or ``weight_decay`` is missing.

    Examples:
        >>> member_settings({"epochs": 16, "lr": 3e-3, "weight_decay": 1.6})
        {'epochs': 32, 'lr': 0.003, 'weight_decay': 0.8}
    """
    if missing := sorted({"epochs", "weight_decay"} - single.keys()):
        raise ValueError(f"the settings of a single model need epochs and weight_decay; {missing} missing")
    epochs, decay = single["epochs"], single["weight_decay"]
    return {
        **single,
        "epochs": max(epochs, min(2 * epochs, most_epochs)),
        "weight_decay": min(decay, max(decay / 2, least_decay)),
    }


class _Runs:
    """Losses by settings; each is asked for once."""

    def __init__(self, run: Callable[[dict[str, float]], float]) -> None:
        self._run = run
        self._known: dict[tuple[tuple[str, float], ...], tuple[Settings, float]] = {}

    def __call__(self, settings: Settings) -> float:
        key = tuple(sorted(settings.items()))
        if key not in self._known:
            loss = float(self._run(dict(settings)))
            if loss != loss:
                raise ValueError(f"the loss of {dict(settings)} is NaN; return infinity for a run that diverged")
            self._known[key] = (dict(settings), loss)
        return self._known[key][1]

    def certificate(self, center: Settings, grids: Grids) -> Certificate:
        points = box(center, grids)
        here = self(points[0])
        better = sorted((point for point in points[1:] if self(point) < here), key=self)
        return Certificate(dict(center), tuple(self._known.values()), tuple(better))


def _position(axis: str, value: float, values: Sequence[float]) -> int:
    if any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"the grid of {axis} must rise, got {list(values)}")
    if value not in values:
        raise ValueError(f"{axis}={value!r} is not on its grid {list(values)}; add it, or begin at a value that is")
    return list(values).index(value)
