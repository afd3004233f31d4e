"""Weights as multiples of a step, exactly."""

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, positive

__all__ = ["STEP", "from_multiples", "multiples", "quantize"]

STEP = positive("the distance of neighbouring values", "a power of two, such as 2**-8, keeps them short")
_LARGEST = 2**31 - 1


@allowed(step=STEP)
@torch.no_grad()
def multiples(weights: Tensor, step: float) -> Tensor:
    """``round(w / step)``, to even where a weight lies in the middle.

    Args:
        weights: any shape, floating point.
        step: positive.

    Returns:
        int64, of their shape.

    Raises:
        TypeError: weights that are no real floating-point numbers.
        ValueError: one is not finite, or has more than 2^31 - 1 steps.

    Examples:
        >>> multiples(torch.tensor([0.3, -0.24, 0.125]), 0.25)
        tensor([ 1, -1,  0])
    """
    if not weights.is_floating_point():
        raise TypeError(f"weights must be real floating-point numbers, got {weights.dtype}")
    numbers = torch.round(weights.detach().double() / step)
    if not bool((numbers.abs() <= _LARGEST).all()):  # NaN compares as False
        worst = weights.detach().abs().double().max()
        what = f"the largest is {float(worst):g}" if bool(torch.isfinite(worst)) else "one is not finite"
        raise ValueError(f"weights must be finite and at most 2^31 - 1 steps of {step:g} large; {what}")
    return numbers.long()


def from_multiples(numbers: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """``step`` times whole numbers, rounded once, to the type.

    Args:
        numbers: int64, any shape.
        step: positive.
        dtype: of the result.
    """
    return (numbers.double() * step).to(dtype)


def quantize(weights: Tensor, step: float) -> Tensor:
    """Weights as a compressed file gives them back, of the same shape and type.

    Args:
        weights: any shape, floating point.
        step: positive.

    Raises:
        TypeError: weights that are no real floating-point numbers.
        ValueError: one is not finite, or too large for the step.

    Examples:
        >>> quantize(torch.tensor([0.3, -0.24, 0.125]), 0.25)
        tensor([ 0.2500, -0.2500,  0.0000])
    """
    return from_multiples(multiples(weights, step), step, weights.dtype)
