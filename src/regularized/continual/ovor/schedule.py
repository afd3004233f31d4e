"""The learning rate of both phases of a task together, as the released code has it."""

import math
from collections.abc import Callable

from regularized.mechanisms.ranges import allowed, count
from regularized.training.progress import Progress

__all__ = ["epoch_cosine"]


@allowed(epochs=count(1), lag=count(0), start=count(0))
def epoch_cosine(epochs: int, *, lag: int = 1, start: int = 0) -> Callable[[Progress], float]:
    """Factor ``cos(99 pi j / (200 (E - 1)))`` on the rate, one for each epoch.

    Epoch e has ``j = max(0, e - lag)``. By the formula (``lag=0``) the last epoch would have 0.0157 of the rate; in the
    released code the first is made twice and the last one never comes.

    Args:
        epochs: E, of both phases together.
        lag: default 1, the released code.
        start: epochs that came before, such as those of the first phase; default 0.

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> factor = epoch_cosine(20)
        >>> [round(factor(Progress(0, 1, epoch, 20)), 4) for epoch in (0, 1, 2, 19)]
        [1.0, 1.0, 0.9967, 0.0974]
    """

    def factor(progress: Progress) -> float:
        j = max(0, progress.epoch + start - lag)
        return math.cos(99.0 * math.pi * j / (200.0 * max(epochs - 1, 1)))

    return factor
