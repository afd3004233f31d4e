"""How the radius of the box grows over the warm-up: like a power at first, then along a line that continues it."""

from dataclasses import dataclass

from regularized.mechanisms.ranges import at_least, between, check_fields, count, positive
from regularized.training.progress import Progress

__all__ = ["SmoothedRadius"]


@dataclass(frozen=True, slots=True)
class SmoothedRadius:
    """The radius at each optimizer step, a function of :class:`~regularized.training.progress.Progress`.

    Epochs are counted from 1 as the authors do: the radius is 0 before epoch ``start``, and ``largest`` from the end
    of epoch ``start + length - 1`` on. It is a function of the step alone, so a training that goes on from a saved
    step goes on exactly.

    Args:
        largest: the radius that is wanted, in units of the raw input.
        start: epoch in which it begins to grow; 2 for CIFAR-10 and TinyImageNet, 1 for MNIST.
        length: epochs of growth; 80 of 160 for CIFAR-10, 20 of 80 for TinyImageNet, 20 of 70 for MNIST.
        batches_per_epoch: optimizer steps of an epoch.
        middle: share of the growth in which it follows the power; default 0.25, the authors'.
        exponent: of the power; default 4, the authors'.

    Raises:
        ValueError: ``largest`` is not positive, a count is below 1, the exponent below 2, or the middle no share.

    Examples:
        >>> radius = SmoothedRadius(0.4, start=1, length=2, batches_per_epoch=8)
        >>> [round(radius.at(step), 4) for step in (0, 4, 10, 16, 99)]
        [0.0, 0.0308, 0.2154, 0.4, 0.4]
    """

    largest: float
    start: int
    length: int
    batches_per_epoch: int
    middle: float = 0.25
    exponent: float = 4.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            largest=positive("in units of the raw input"),
            start=count(1, "the first epoch"),
            length=count(1, "epoch of growth", "for a constant radius give the number itself"),
            batches_per_epoch=count(1, "the length of the loader"),
            middle=between(0.0, 1.0, "[]", "a share of the growth"),
            exponent=at_least(2.0, "the authors use 4"),
        )

    @property
    def first_step(self) -> int:
        """The last step at which the radius is 0."""
        return (self.start - 1) * self.batches_per_epoch

    @property
    def last_step(self) -> int:
        """The first step at which it is ``largest``."""
        return (self.start + self.length - 1) * self.batches_per_epoch

    def at(self, step: int) -> float:
        """The radius of an optimizer step, counted from 0."""
        if step <= self.first_step:
            return 0.0
        growth = self.last_step - self.first_step
        curved = int(growth * self.middle)
        # The power has at its end the slope of the line, (largest - value) / straight.
        straight = growth - curved
        value = self.largest * curved / (straight * self.exponent + curved)
        done = step - self.first_step
        if done < curved:
            return value * float((done / curved) ** self.exponent)
        return (
            min(value + (self.largest - value) * (done - curved) / straight, self.largest) if straight else self.largest
        )

    def __call__(self, progress: Progress) -> float:
        """The radius of a step."""
        return self.at(progress.step)
