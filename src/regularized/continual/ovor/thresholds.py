"""Thresholds of the energies, from the energies that the head has: published ones fit the logits of one network."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regularized.mechanisms.ranges import between, check_fields, positive

__all__ = ["EnergyQuantile", "Thresholds", "warn_of_scale"]

_FAR = 10.0  # above tau_id: then the Huber loss pulls every feature with its full, constant force


class Thresholds(NamedTuple):
    """The two thresholds: real features below the first, outliers above the second.

    Attributes:
        tau_id: of real features.
        tau_ood: of outliers.

    Raises:
        ValueError: by :meth:`check`, where they are in the wrong order.

    Examples:
        >>> Thresholds(-15.0, -3.0).check()  # the released ones, in the right order
    """

    tau_id: float
    tau_ood: float

    def check(self) -> None:
        """Refuse thresholds in the wrong order.

        Raises:
            ValueError: ``tau_id`` is not below ``tau_ood``.
        """
        if not self.tau_id < self.tau_ood:
            raise ValueError(
                f"in-distribution energies must lie below outlier energies: tau_id must be below tau_ood, got "
                f"{self.tau_id} and {self.tau_ood}; the released code has -15 and -3"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyQuantile:
    """Thresholds from the first task's energies, as its head has them when its second phase begins.

    Args:
        quantile: of the energies of real features, which becomes tau_id; default 0.25, so that a quarter is where it
            belongs already.
        margin: tau_ood - tau_id; default 12, the distance of the published -15 and -3.
        each_task: take them anew from each task. Default False: all tasks aim at the same energies, and so at logits of
            one scale, which is what lets their classes be compared.

    Raises:
        ValueError: an option is outside its range.

    Examples:
        >>> EnergyQuantile(quantile=0.5).of(torch.tensor([-9.0, -7.0, -5.0]))
        Thresholds(tau_id=-7.0, tau_ood=5.0)
    """

    quantile: float = 0.25
    margin: float = 12.0
    each_task: bool = False

    def __post_init__(self) -> None:
        check_fields(self, quantile=between(0.0, 1.0), margin=positive("tau_ood less tau_id"))

    def of(self, energies: Tensor) -> Thresholds:
        """The thresholds for energies (n,)."""
        tau_id = float(energies.detach().float().quantile(self.quantile))
        return Thresholds(tau_id, tau_id + self.margin)


def warn_of_scale(energies: Tensor, thresholds: Thresholds) -> None:
    """Say so where every training energy is far above its threshold before the phase has begun.

    Args:
        energies: (n,) of real features.
        thresholds: that are to be used.

    Warns:
        UserWarning: they are all more than 10 above.
    """
    if float(energies.min()) > thresholds.tau_id + _FAR:
        shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=energies.device)
        quantiles = [round(value, 2) for value in energies.float().quantile(shares).tolist()]
        warnings.warn(
            f"the thresholds do not match the logit scale: tau_id is {thresholds.tau_id:g}, but the quartiles of the "
            f"training energies are {quantiles}; take thresholds=EnergyQuantile(), or a tau_id among them",
            stacklevel=3,
        )
