"""The two penalties of the warm-up, and the paper's symbols.

===================  ================================  ==============================================================
paper                here                              what it is
===================  ================================  ==============================================================
epsilon              ``radius``, ``largest``           radius of the input's box, now and after the warm-up
h lower, h upper     ``lower``, ``upper``              bounds of a ReLU's input
c, delta             ``centre``, ``radius``            their middle, and half of their width
tau                  ``tolerance``                     what the ratios below may fall to; 0.5
lambda_0             ``penalty``                       strength; 0.5, on TinyImageNet 0.1 to 0.2
lambda               ``penalty (1 - radius/largest)``  the same at one step: it ends as the warm-up does
L_tightness, L_relu  ``tightness``, ``relu_balance``   the penalties
===================  ================================  ==============================================================

With m ReLUs, tau_0 the mean radius of the input's box, and means over batch and coordinates::

    tightness  = 1/m  sum_i  max(0, tau - tau_0 / mean(radius_i)) / tau
    balance    = 1/m  sum_i  (max(0, tau - fold(a_i / n_i)) + max(0, tau - fold(va_i / vn_i))) / tau

where a and n are the mean of the centre over the active entries (lower > 0) and minus that over the inactive ones
(upper < 0), va and vn the sums of squares of the centre around its mean, and ``fold(q) = min(q, 1/q)``. As in the
official code a layer with an undefined ratio adds nothing: one without surely inactive entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from regularized.robustness.certified_training.interval import Interval

__all__ = ["relu_balance", "tightness"]


def tightness(box: Interval, relu_inputs: Sequence[Interval], *, tolerance: float = 0.5) -> Tensor:
    """How far the boxes before the ReLUs have widened: 0 if none is wider than ``1 / tolerance`` times the input's.

    Args:
        box: of the input.
        relu_inputs: boxes before each ReLU.
        tolerance: default 0.5, the paper's.

    Returns:
        Scalar in [0, 1).

    Examples:
        >>> unit = Interval.around(torch.zeros(1, 2), torch.ones(1, 2))
        >>> wide = Interval.around(torch.zeros(1, 2), torch.full((1, 2), 4.0))
        >>> tightness(unit, [unit, wide])
        tensor(0.2500)
    """
    at_input = box.radius.mean()
    widths = torch.stack([before.radius.mean() for before in relu_inputs])
    return torch.relu(tolerance - at_input / widths.clamp(min=1e-12)).mean() / tolerance


def relu_balance(relu_inputs: Sequence[Interval], *, tolerance: float = 0.5) -> Tensor:
    """How far apart the entries that are surely active and those that are surely inactive lie.

    Args:
        relu_inputs: boxes before each ReLU.
        tolerance: default 0.5, the paper's.

    Returns:
        Scalar in [0, 2]. Layers without an entry that is surely inactive add nothing, as in the official code.

    Examples:
        >>> even = Interval.around(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2))
        >>> skew = Interval.around(torch.tensor([[4.0, -1.0]]), torch.zeros(1, 2))
        >>> relu_balance([even]), relu_balance([skew])
        (tensor(0.), tensor(0.5000))
    """
    moments = torch.stack([_moments(before) for before in relu_inputs])
    active, inactive, active_squares, inactive_squares = moments.unbind(dim=1)
    means, means_known = _folded(active, inactive)
    squares, squares_known = _folded(active_squares, inactive_squares)
    terms = torch.relu(tolerance - means) + torch.relu(tolerance - squares)
    return torch.where(means_known & squares_known & (inactive > 0), terms, 0.0).mean() / tolerance


def _folded(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller over the larger of two numbers >= 0, and where that is defined; elsewhere 1, without gradient."""
    larger = torch.maximum(one, other)
    known = (larger > 0) & torch.isfinite(larger)
    return torch.where(known, torch.minimum(one, other), 1.0) / torch.where(known, larger, 1.0), known


def _moments(box: Interval) -> Tensor:
    moments: Tensor = _Moments.apply(box.centre, box.radius)  # type: ignore[no-untyped-call]
    return moments


class _Moments(torch.autograd.Function):
    """(4,) of a box: centre summed over active and minus that over inactive entries, and squares around its mean.

    Which entries are active has no gradient. Masks are numbers: booleans would be converted in each product.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, centre: Tensor, radius: Tensor) -> Tensor:
        mean = centre.mean()
        apart = centre - mean
        active = torch.gt(centre, radius, out=torch.empty_like(apart))
        inactive = torch.gt(-centre, radius, out=torch.empty_like(apart))
        up, down = (apart * active).flatten(), (apart * inactive).flatten()
        ctx.save_for_backward(centre, active, inactive)
        means = up.sum() + mean * active.sum(), -down.sum() - mean * inactive.sum()
        return torch.stack([*means, up.dot(up), down.dot(down)])

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        centre, active, inactive = ctx.saved_tensors  # type: ignore[attr-defined]
        of_up, of_down, of_up_squares, of_down_squares = gradients[0].unbind()
        apart = centre - centre.mean()  # anew, so that it has a derivative of its own
        ups, downs = (apart.flatten().dot(mask.flatten()) for mask in (active, inactive))
        through_mean = (of_up_squares * ups + of_down_squares * downs) * (-2.0 / apart.numel())
        gradient = torch.addcmul(of_up, apart, 2.0 * of_up_squares) * active
        gradient = gradient + torch.addcmul(-of_down, apart, 2.0 * of_down_squares) * inactive
        return gradient + through_mean, None
