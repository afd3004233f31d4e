"""BackSlash as a step after the optimizer's, for any loop, with the checks that only make sense once."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from regularized.compression.generalized_gaussian.distribution import WeightMoments, ratio_table, weight_moments
from regularized.compression.generalized_gaussian.penalty import EPS, SHAPE, STRENGTH, distinct, shrink_
from regularized.mechanisms.ranges import allowed

__all__ = ["Shrinker"]


class Shrinker:
    """Shrinks weights after each optimizer step, with a force that follows the shape of their distribution.

    The authors' repository does this; the paper has the rate in the loss
    (:class:`~regularized.compression.generalized_gaussian.BackSlash`). Without the learning rate in it, it goes on
    while a schedule ends: stop it for the last epochs.

    Args:
        weights: all that are shrunk, on one device, such as ``model.parameters()``; biases and normalisation are among
            them in the authors' repository.
        strength: lambda, at least 0. A weight is shrunk by about ``strength nu / N`` a step, so it belongs to the
            number N of weights: the repository's 2,000 is for 10^8.
        eps: see :func:`~regularized.compression.generalized_gaussian.shrink_`; default 1.
        shape: nu, for L1 (1) or L2 (2); default that of the weights at each step.
        optimizer: if given, it is looked at for weight decay.

    Raises:
        ValueError: there is no weight, or an option is out of range.

    Warns:
        UserWarning: a step would move half of the weights by more than their size; the optimizer decays them, too.

    Examples:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer, shrinker = torch.optim.SGD(model.parameters(), lr=0.1), Shrinker(model.parameters(), 1e-3)
        >>> model(torch.randn(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> moments = shrinker.step()
    """

    @allowed(strength=STRENGTH, eps=EPS, shape=SHAPE)
    def __init__(
        self,
        weights: Iterable[Tensor],
        strength: float,
        *,
        eps: float = 1.0,
        shape: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.weights: list[Tensor] = distinct(weights)
        self.strength: float = strength
        self.eps: float = eps
        self.shape: float | None = shape
        self._table = ratio_table(self.weights[0].device)
        if strength:
            self._warn_if_strong()
        if optimizer is not None:
            self._warn_of_decay(optimizer)

    def step(self, strength: float | None = None) -> WeightMoments:
        """Shrink once.

        Args:
            strength: of this step, for schedules; default that of the constructor.

        Returns:
            The moments of the weights before it; nothing waits for a GPU.
        """
        now = self.strength if strength is None else strength
        if self._table.device != self.weights[0].device:  # the model has been moved
            self._table = self._table.to(self.weights[0].device)
        return shrink_(self.weights, now, eps=self.eps, shape=self.shape, table=self._table)

    @torch.no_grad()
    def _warn_if_strong(self) -> None:
        sizes = torch.cat([w.abs().flatten().float() for w in self.weights])
        median = float(sizes.median())
        nu = float(weight_moments(self.weights, table=self._table).shape) if self.shape is None else self.shape
        move = self.strength * nu / sizes.numel() * max(median + self.eps, 1e-30) ** (nu - 1)
        if median and move > median:
            warnings.warn(
                f"strength {self.strength:g} moves a weight by {move:.3g} a step, and half of the {sizes.numel():,} "
                f"weights are smaller than {median:.3g}: they would only change their signs. What counts is strength "
                f"over the number of weights; {self.strength * median / move / 100:.2g} would move them by 1 %",
                stacklevel=5,  # torch.no_grad and @allowed are frames, too,
            )

    def _warn_of_decay(self, optimizer: torch.optim.Optimizer) -> None:
        ours = {id(w) for w in self.weights}
        decayed = [
            group["weight_decay"]
            for group in optimizer.param_groups
            if group.get("weight_decay") and any(id(p) in ours for p in group["params"])
        ]
        if decayed:
            warnings.warn(
                f"the optimizer decays these weights, too (weight_decay={decayed[0]:g}): both pull them to zero",
                stacklevel=4,
            )
