"""Values of a step: the rate rises and falls, the decay falls or rises, the average becomes slower."""

import math

from regularized.mechanisms.ranges import allowed, count, positive

__all__ = ["average_momentum", "cosine_value", "warmup_cosine"]


@allowed(warmup=count(0), total=count(1))
def warmup_cosine(step: int, *, warmup: int, total: int, peak: float, start: float = 0.0, final: float = 0.0) -> float:
    """Linear from ``start`` to ``peak`` in ``warmup`` steps, then half a cosine to ``final`` at ``total``.

    Args:
        step: number of the step, from 0.
        warmup: steps of the rise.
        total: steps in all.
        peak: value after the rise.
        start: value at step 0; default 0 (the authors' runs).
        final: value at step ``total`` and behind it; default 0 (the same).

    Examples:
        >>> [round(warmup_cosine(i, warmup=2, total=6, peak=1.0), 3) for i in (0, 1, 2, 4, 6)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return start + step / warmup * (peak - start)
    return cosine_value(step - warmup, total=max(1, total - warmup), start=peak, final=final)


@allowed(total=count(1))
def cosine_value(step: int, *, total: int, start: float, final: float) -> float:
    """Half a cosine from ``start`` to ``final`` at step ``total``, and ``final`` behind it.

    Args:
        step: number of the step, from 0.
        total: steps in all.
        start: value at step 0.
        final: value at step ``total``.

    Examples:
        >>> round(cosine_value(1, total=2, start=1e-5, final=1e-2), 6)
        0.005005
    """
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0)))


@allowed(total=positive())
def average_momentum(step: int, *, total: float, start: float = 0.996, final: float = 1.0) -> float:
    """Share of the average that stays, ``start + (final - start) step / total``; ``final`` behind the end.

    Args:
        step: number of the update, from 0, so that the last one of a run still moves the average.
        total: updates in all.
        start: default 0.996 (official).
        final: default 1 (official).

    Examples:
        >>> average_momentum(5, total=10)
        0.998
    """
    return start + (final - start) * min(step / total, 1.0)
