"""The form of an experiment: what ``papers/<slug>/experiment.py`` offers and what a run gives back.

An experiment is a plain module with::

    SCALES: dict[str, dict]     settings of "smoke", "laptop" and "paper"
    ARMS: dict[str, dict]       settings of each arm, baselines first
    run(arm, seed, scale) -> Measurements

and, where hyperparameters were chosen::

    TUNING: Tuning              the same number of trials for each arm
    run(arm, seed, scale, **overrides)

It trains and measures; statistics, plots, verdicts and storage are done elsewhere, from all seeds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Experiment", "Illustrated", "Measurements", "Tuning", "Unavailable", "data_fingerprint"]


class Unavailable(RuntimeError):
    """A scale cannot run here; the message says which data, package or hardware is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What one run of one arm with one seed measured.

    Args:
        metrics: final numbers by name.
        curves: learning curves by name, as (x, y) points; x in ``curve_unit``.
        data: fingerprint of the data that was used, see :func:`data_fingerprint`.
        curve_unit: what the x of the curves counts; default epochs.
    """

    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    data: str = ""
    curve_unit: str = "epoch"


@dataclass(frozen=True, slots=True)
class Illustrated(Measurements):
    """Measurements with pictures, which ``reproduce`` saves beside its report; the ledger does not hold them.

    Args:
        images: (H, W) grey or (H, W, 3) colour by name, values in [0, 1].
    """

    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the hyperparameters of the arms were chosen: the same budget and the same criterion for each.

    Args:
        metric: metric that decides, measured on data that a user would have (noisy validation labels, say), not the
            test set.
        direction: ``"higher"`` or ``"lower"``.
        grids: for each arm the overrides that were tried; equally many for every arm, the chosen one among them.
        scale: scale of the trials; default ``"laptop"``.
        seeds: seeds of the trials, disjoint from those of the evidence (which are 0, 1, 2, ...).
    """

    metric: str
    direction: str
    grids: Mapping[str, Sequence[Mapping[str, Any]]]
    scale: str = "laptop"
    seeds: tuple[int, ...] = (1000, 1001)

    def __post_init__(self) -> None:
        budgets = {arm: len(grid) for arm, grid in self.grids.items()}
        if len(set(budgets.values())) > 1:
            raise ValueError(f"every arm must get the same tuning budget, got trials {budgets}")


class Experiment(Protocol):
    """What the evidence storey needs of an experiment module."""

    SCALES: Mapping[str, Mapping[str, Any]]
    ARMS: Mapping[str, Mapping[str, Any]]

    def run(self, arm: str, seed: int, scale: str, **overrides: Any) -> Measurements:
        """Train and measure one arm with one seed.

        Raises:
            Unavailable: data, a package or hardware of this scale is missing.
        """
        ...


def data_fingerprint(*arrays: NDArray[Any]) -> str:
    """Short hash of the content, type and shape of arrays.

    Examples:
        >>> data_fingerprint(np.zeros(3)) == data_fingerprint(np.zeros(3)) != data_fingerprint(np.zeros(4))
        True
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
