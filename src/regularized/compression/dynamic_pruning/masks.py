"""Dynamic pruning: every image runs through those filters of a convolutional network that it needs, and no others.

For networks that are trained and too expensive to run. Beside each convolution stands a tiny predictor that sees the
layer's pooled input and says which of its filters will answer strongly to this image; the others are switched off. What
it should say comes from the network itself: the strongest filters that together hold a share r of the layer's response.
That share is the one knob, and what it saves can be counted on the dense network before any training.

    Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask
    Prediction", CVPR 2022, arXiv 2110.08232. Official code: github.com/selkerdawy/FTWT at fc9e27f (CIFAR; no licence
    file, so nothing of it is here).

==========  =======================  ===============================================================================
paper       here                     meaning
==========  =======================  ===============================================================================
x, o        ``x, out``               (B, Ci, H, W) input and (B, Co, H', W') output of convolution, norm, activation
a           ``strengths``            (B, Co) largest magnitude of a filter's output: :func:`filter_strengths`
r           ``mass``                 share of ``sum(a)`` that the kept filters hold
g           ``wanted``               (B, Co) bool, the predictor's target: :func:`mass_mask`, :func:`top_mask`
z           ``logits``               (B, Co) what the predictor says
m           ``kept``                 (B, Co) bool, what is computed: :func:`predicted_mask`; a constant for autograd
k           ``kept.sum(1)``          filters that an image uses in a layer
==========  =======================  ===============================================================================

The loss is ``CE + w * mean over layers of sum over filters of mean over the batch of BCE(z, g)``
(:func:`~regularized.compression.dynamic_pruning.loss.mask_loss`). The cross-entropy does not reach the predictors,
since the mask is a constant; in the ``"decoupled"`` mode the predictor sees a detached input, so that its loss does not
reach the network either.

Where paper and code differ we follow the code: it drops the filter that crosses the share r, so that the kept mass is
at most r (the paper: at least), and its predictor pools by the mean and takes a softmax over channels (the paper, by a
second-hand summary, pools by the maximum). With a small r the code can drop *all* filters of a layer; ``min_keep=1``,
the default, keeps the strongest.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import Interval, allowed, count

__all__ = ["DELTA", "MASS", "Activation", "filter_strengths", "mass_mask", "predicted_mask", "top_mask"]

# Shapes: B images, Co filters of a layer, H' x W' positions of its output.

Activation: TypeAlias = Callable[[Tensor], Tensor]

DELTA = 1e-5
"""Rounding that cumulative sums are forgiven, and what counts as no response; of the official code."""

MASS = Interval(
    0.0,
    1.0,
    "(]",
    meaning="the share of the activation mass that is kept",
    remedy="0.9 keeps 90 %, and -1 switches pruning off; prune_ratio is the share that is removed",
)
PRUNE_RATIO = Interval(
    0.0,
    1.0,
    "[)",
    meaning="the share of the filters that is pruned",
    remedy="0.25 removes a quarter, and -1 switches pruning off; mass is the share that is kept",
)

# Nowhere negative and nowhere falling, so that the largest magnitude of f(z) is f of the largest z.
_RISING = (nn.ReLU, nn.ReLU6)
_RISING_FUNCTIONS = (F.relu, torch.relu, F.relu6)


@torch.no_grad()
def filter_strengths(out: Tensor, activation: Activation | None = None) -> Tensor:
    """How strongly each filter answers: the largest magnitude over all positions.

    Args:
        out: (B, Co, H', W').
        activation: what is applied to ``out`` first; for ReLU it is applied to the maximum instead, which is the same.

    Returns:
        (B, Co), without a graph; in float32 at least, and finite where half precision has overflowed.

    Examples:
        >>> filter_strengths(torch.tensor([[[[1.0, -3.0]], [[0.5, -2.0]]]]))
        tensor([[3., 2.]])
        >>> filter_strengths(torch.tensor([[[[1.0, -3.0]], [[0.5, -2.0]]]]), F.relu)
        tensor([[1.0000, 0.5000]])
    """
    if isinstance(activation, _RISING) or activation in _RISING_FUNCTIONS:
        largest = activation(out.amax(dim=(2, 3)))
    else:
        # A copy, since the activation may work in place.
        largest = (out if activation is None else activation(out.clone())).abs().amax(dim=(2, 3))
    strengths = largest.to(torch.promote_types(out.dtype, torch.float32))
    # So that a sum over filters cannot overflow either: inf / inf would keep every filter.
    return strengths.clamp(max=torch.finfo(strengths.dtype).max / out.shape[1])


@allowed(min_keep=count(0))
@torch.no_grad()
def mass_mask(strengths: Tensor, mass: float, *, min_keep: int = 1, delta: float = DELTA) -> Tensor:
    """The strongest filters of each image that together hold at most a share of its activation mass.

    Args:
        strengths: (B, Co), not negative, see :func:`filter_strengths`.
        mass: r, share of the mass in (0, 1]; a filter goes where the running sum of the sorted shares, its own
            included, exceeds it. 1 drops only filters without response. A negative number keeps all.
        min_keep: the strongest so many are always kept; default 1, ours. The official code has none (0), and keeps
            nothing of a layer in which one filter holds more than r.
        delta: rounding that the running sum is forgiven; default 1e-5 (official code).

    Returns:
        (B, Co) bool. The share of each image's mass that is kept is at most ``mass + delta``, but for ``min_keep``.
        An image to which no filter answers keeps ``min_keep`` (in the official code, by 0 / 0, all).

    Raises:
        ValueError: ``mass`` is 0, or above 1.

    Examples:
        >>> mass_mask(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.7)
        tensor([[False,  True, False,  True]])
        >>> mass_mask(torch.tensor([[0.9, 0.1]]), 0.5), mass_mask(torch.tensor([[0.9, 0.1]]), 0.5, min_keep=0)
        (tensor([[ True, False]]), tensor([[False, False]]))
    """
    if mass < 0.0:
        return torch.ones_like(strengths, dtype=torch.bool)
    MASS("mass", mass)
    total = strengths.sum(dim=1, keepdim=True)
    shares, order = (strengths / total.clamp(min=torch.finfo(strengths.dtype).tiny)).sort(dim=1, descending=True)
    keep = shares > delta if mass == 1.0 else shares.cumsum(dim=1) - mass <= delta
    keep &= total > 0.0
    keep[:, :min_keep] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


@allowed(min_keep=count(0))
@torch.no_grad()
def top_mask(strengths: Tensor, prune_ratio: float, *, min_keep: int = 1, delta: float = DELTA) -> Tensor:
    """The strongest filters of each image, equally many for all images: the paper's "uniform" target.

    Args:
        strengths: (B, Co), not negative, see :func:`filter_strengths`.
        prune_ratio: share of the filters that goes, in [0, 1): ``int(prune_ratio * Co)`` of them. A negative number
            keeps all.
        min_keep: the strongest so many are always kept; default 1, ours.
        delta: a filter of this strength or less is dropped, too; default 1e-5 (official code).

    Returns:
        (B, Co) bool.

    Raises:
        ValueError: ``prune_ratio`` is 1 or more.

    Examples:
        >>> top_mask(torch.tensor([[0.1, 0.4, 0.2, 0.0]]), 0.25)
        tensor([[ True,  True,  True, False]])
    """
    if prune_ratio < 0.0:
        return torch.ones_like(strengths, dtype=torch.bool)
    PRUNE_RATIO("prune_ratio", prune_ratio)
    filters = strengths.shape[1]
    rising, order = strengths.sort(dim=1)
    keep = rising > delta
    keep[:, : int(prune_ratio * filters)] = False
    keep[:, max(filters - min_keep, 0) :] |= min_keep > 0
    return torch.zeros_like(keep).scatter_(1, order, keep)


@torch.no_grad()
def predicted_mask(logits: Tensor) -> Tensor:
    """The filters that a predictor switches on: those whose probability exceeds a half.

    Args:
        logits: (B, Co).

    Returns:
        (B, Co) bool, without a graph.

    Examples:
        >>> predicted_mask(torch.tensor([[2.0, 0.0, -1.0]]))
        tensor([[ True, False, False]])
    """
    return logits.sigmoid() > 0.5
