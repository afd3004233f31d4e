"""Weights of single training samples: checked, applied to any loss, or turned into a sampler's probabilities.

A weight can act in two places. On the loss, ``mean(w * loss)``: every sample is visited, some count less. In the
sampler: samples are drawn in proportion to their weight and count the same. Both have the same expected gradient up to
the factor ``mean(w)``; the second saves the passes of samples that hardly count.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from regularized.mechanisms.ranges import Choice, allowed

__all__ = [
    "Aggregate",
    "WeightedLoss",
    "WeightedSampler",
    "check_shapes",
    "check_unit_interval",
    "check_unreduced",
    "weighted_mean",
]

Aggregate: TypeAlias = Literal["per_sample", "batch_mean"]


def check_unit_interval(values: Tensor, *, name: str, remedy: str = "") -> None:
    """Refuse values outside [0, 1], NaN included.

    Values are looked at only while they are on the CPU, and not under ``torch.compile``: reading them on a GPU would
    stop the step.

    Args:
        values: any shape, floating point.
        name: what they are, for the message.
        remedy: what to do instead, for the message.

    Raises:
        TypeError: not a tensor of floating point numbers.
        ValueError: a value is outside [0, 1].

    Examples:
        >>> check_unit_interval(torch.tensor([0.0, 1.0]), name="easiness")
        >>> check_unit_interval(torch.tensor([1.5]), name="easiness")
        Traceback (most recent call last):
        ...
        ValueError: easiness must be in [0, 1], got 1.5
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a tensor of floating point numbers in [0, 1], got {given}")
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (float(value) for value in torch.aminmax(values.detach()))
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails
        raise ValueError(
            f"{name} must be in [0, 1], got {high if low >= 0.0 else low:.6g}{'; ' if remedy else ''}{remedy}"
        )


def weighted_mean(losses: Tensor, weights: Tensor, *, aggregate: Aggregate = "per_sample") -> Tensor:
    """Weighted mean of the losses of a batch, divided by the number of samples and not by the sum of the weights.

    Args:
        losses: (B,) one loss a sample.
        weights: (B,) one weight a sample.
        aggregate: ``"per_sample"``: ``mean(w * loss)``. ``"batch_mean"``: ``mean(w) * mean(loss)``, in which the
            weights of a batch act on all its samples alike; it is a factor on the learning rate more than a weighting.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes differ, or are not (B,).

    Examples:
        >>> losses, weights = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0])
        >>> weighted_mean(losses, weights), weighted_mean(losses, weights, aggregate="batch_mean")
        (tensor(0.5000), tensor(1.))
    """
    check_shapes(losses, weights)
    if aggregate == "batch_mean":
        return losses.mean() * weights.mean()
    return (losses * weights).mean()


def check_shapes(losses: Tensor, weights: Tensor, *, name: str = "weights") -> None:
    """Refuse weights that do not belong to these losses, one by one; broadcasting would hide the mistake.

    Raises:
        ValueError: naming both shapes.
    """
    if losses.ndim == 0:
        raise ValueError(
            f"the loss is a single number, but {name} of shape {tuple(weights.shape)} need one loss a sample; "
            "compute the loss with reduction='none'"
        )
    if losses.ndim != 1 or weights.shape != losses.shape:
        raise ValueError(
            f"{name} and losses must both have the shape (B,): {name} have {tuple(weights.shape)}, losses have "
            f"{tuple(losses.shape)}; take the mean of the loss over all dimensions but the first"
        )


def check_unreduced(loss: Callable[..., Any], *, owner: str) -> None:
    """Refuse a torch loss that returns the mean or the sum of a batch.

    Raises:
        TypeError: it cannot be called.
        ValueError: its ``reduction`` is not ``"none"``.
    """
    if not callable(loss):
        raise TypeError(f"{owner} needs a loss function or module, got {type(loss).__name__}")
    reduction = getattr(loss, "reduction", "none")
    if reduction != "none":
        raise ValueError(
            f"{owner} weights each sample and needs a loss with reduction='none', got reduction={reduction!r}; build "
            f"it as {type(loss).__name__}(reduction='none')"
        )


class WeightedLoss(nn.Module):
    """Any per-sample loss times given weights; in ``eval()`` mode the plain mean.

    Args:
        loss: called with two arguments (outputs and targets, say); returns one loss a sample, shape (B,), such as a
            torch loss with ``reduction="none"``.
        aggregate: see :func:`weighted_mean`; default ``"per_sample"``.

    Raises:
        ValueError: ``loss`` reduces, or ``aggregate`` is unknown; at the call: shapes of losses and weights differ.
        TypeError: ``loss`` cannot be called.

    Examples:
        >>> criterion = WeightedLoss(nn.MSELoss(reduction="none"))
        >>> criterion(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([1.0, 0.5]))
        tensor(2.7500)
    """

    @allowed(aggregate=Choice("per_sample", "batch_mean"))
    def __init__(self, loss: Callable[[Any, Any], Tensor], *, aggregate: Aggregate = "per_sample") -> None:
        super().__init__()
        check_unreduced(loss, owner=type(self).__name__)
        self.loss = loss
        self.aggregate: Aggregate = aggregate

    def forward(self, outputs: Any, targets: Any, weights: Tensor) -> Tensor:
        """Weighted mean loss of the batch.

        Args:
            outputs: first argument of the loss.
            targets: second argument of the loss.
            weights: (B,) one weight a sample.

        Returns:
            Scalar.
        """
        losses = self.loss(outputs, targets)
        check_shapes(losses, weights)
        return weighted_mean(losses, weights, aggregate=self.aggregate) if self.training else losses.mean()


class WeightedSampler(Sampler[int]):
    """Draws sample indices, with replacement, in proportion to weights that may change from epoch to epoch.

    The order is a function of (seed, epoch) alone, so it resumes without state. Unlike torch's
    ``WeightedRandomSampler`` it knows the epoch and has no limit of 2^24 samples. Use it as the ``sampler`` of a
    ``DataLoader``; our ``Trainer`` calls :meth:`set_epoch` by itself.

    Args:
        weights: (N,) weights >= 0, not all of them 0, or a function from the epoch (counted from 0) to them.
        num_samples: draws an epoch; default as many as there are weights.
        seed: of the draws; default 0.

    Raises:
        ValueError: no draw or no sample, a weight that is negative or not finite, or weights that are all 0.

    Examples:
        >>> rising = WeightedSampler(lambda epoch: torch.tensor([1.0, float(epoch > 0)]), num_samples=100)
        >>> set(rising)
        {0}
        >>> rising.set_epoch(1)
        >>> set(rising)
        {0, 1}
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float] | Callable[[int], Tensor],
        *,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self._weights = weights if callable(weights) else torch.as_tensor(weights, dtype=torch.float64)
        self._epoch = 0
        self.seed = seed
        self.num_samples: int = len(self._cumulated()) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch that begins, counted from 0."""
        self._epoch = epoch

    def _cumulated(self) -> Tensor:
        weights = self._weights(self._epoch) if callable(self._weights) else self._weights
        weights = weights.detach().to("cpu", torch.float64)
        if weights.ndim != 1 or len(weights) == 0:
            raise ValueError(f"weights must have the shape (N,) with N >= 1, got {tuple(weights.shape)}")
        low, total = float(weights.min()), float(weights.sum())
        if not (low >= 0.0 and 0.0 < total < math.inf):
            raise ValueError(
                f"weights must be finite, >= 0 and not all 0; the smallest is {low:.6g}, their sum is {total:.6g}"
            )
        return weights.cumsum(0)

    def __iter__(self) -> Iterator[int]:
        """Indices of one epoch."""
        # Two numbers make one seed, such that neighbouring seeds share no epoch.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._epoch) % 2**63)
        cumulated = self._cumulated()
        total = cumulated[-1]
        draws = torch.rand(self.num_samples, dtype=torch.float64, generator=generator) * total
        # Strictly below the total, and right=True (a draw on a boundary goes to the sample after it): so a sample of
        # weight 0 is never drawn.
        draws = draws.minimum(torch.nextafter(total, torch.zeros_like(total)))
        yield from torch.searchsorted(cumulated, draws, right=True).tolist()

    def __len__(self) -> int:
        """Draws an epoch."""
        return self.num_samples
